"""``report.html``: the files of a run folder as one page that needs nothing but itself."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from trimtab.metrics import METRICS, Metric
from trimtab.reports.run import pairs, prompts
from trimtab.reports.run.curves import curves, describe
from trimtab.reports.run.measured import baseline, headline, interval, measured
from trimtab.reports.run.run_pictures import draw_curves, share_bars
from trimtab.reports.shared import words
from trimtab.reports.shared.shell import write_page
from trimtab.runs.read import Run, TestSet, read_run
from trimtab.runs.records import MetricsLine
from trimtab.runs.results import ChoiceResult

_WIDE, _NARROW = 880, 358
# Up to so many letters, answers stand beside each other rather than below.
_SHORT = 14
# Rows shown of each group: those that training put right first of all, none of those that were right all along.
_SHOWN = {
    (False, True): 4,
    (True, False): 3,
    (False, False): 3,
    (None, False): 4,
    (None, True): 3,
    (False, None): 3,
    (True, None): 3,
}


def write_run_page(run: Path) -> Path:
    """Write ``run/report.html`` and return its path. Raises RunError as ``read_run`` does."""
    known = read_run(run)
    train, validation = known.measures("train"), known.measures("validation")
    measured_sets = [tests for tests in known.sets if tests.result]
    data = curves(known.metrics, known.summary.best_step if known.summary else None)
    curve_text = describe(data)
    values = {
        "run": known,
        "summary": known.summary,
        "plan": known.plan,
        "results": measured_sets,
        "headline": [headline(tests) for tests in measured_sets],
        "tiles": tiles(known, train),
        "measured": measured,
        "baseline": baseline,
        "bars": bars,
        "confusion": confusion,
        "validated": validated(validation),
        "curve": data,
        "curve_text": curve_text,
        # For a wide and for a narrow screen.
        "pictures": [
            (kind, draw_curves(f"curve-{kind}", data, width, curve_text))
            for kind, width in (("wide", _WIDE), ("narrow", _NARROW))
            if data.any
        ],
        "answered": answered(known.sets),
        "shown": shown,
        "paths": {"run": shlex.quote(str(run)), "config": shlex.quote(str(Path(run) / "config.yaml"))},
    }
    return write_page(Path(run) / "report.html", "run/run.html", values)


def validated(validation: Sequence[MetricsLine]) -> list[Metric]:
    """The metrics besides the loss that the validations took."""
    taken = {name for line in validation for name in line.figures}
    return [METRICS[name] for name in METRICS if name in taken]


class Tile(NamedTuple):
    """One key figure: what it is, the figure, and a line that puts it in proportion."""

    name: str
    value: str
    note: str = ""


def tiles(run: Run, train: Sequence[MetricsLine]) -> list[Tile]:
    """The key figures that the run knows; ``train``: its measures of training."""
    summary = run.summary
    known = []
    sizes = run.plan or (summary if summary and summary.trainable_parameters and summary.total_parameters else None)
    if sizes:
        trained, total = sizes.trainable_parameters or 0, sizes.total_parameters or 0
        note = f"{words.small_percent(trained, total)} of {words.count(total)}"
        known.append(Tile("Trained parameters", words.count(trained), note))
    if summary and summary.adapter_bytes is not None:
        known.append(Tile("Adapter on disk", words.size(summary.adapter_bytes), "in the folder adapter"))
    if summary and summary.training_seconds is not None:
        note = f"{words.duration(summary.total_seconds)} in all" if summary.total_seconds is not None else ""
        known.append(Tile("Training time", words.duration(summary.training_seconds), note))
    if summary and summary.peak_memory_gib is not None:
        whole = summary.machine.memory_gib
        note = f"of {words.gib(whole, 1)}" if whole else ""
        known.append(Tile("Peak memory", words.gib(summary.peak_memory_gib, 1), note))
    speeds = [measure.tokens_per_second for measure in train if measure.tokens_per_second]
    if speeds:
        known.append(Tile("Tokens per second", words.count(round(statistics.median(speeds))), "median while training"))
    steps = summary.steps if summary else None
    if steps is None:
        steps = max((measure.step for measure in train), default=None)
    if steps is not None:
        known.append(Tile("Steps", words.count(steps), _steps_note(run)))
    return known


def _steps_note(run: Run) -> str:
    if not run.summary:
        return ""
    epochs, rows = run.summary.epochs, run.summary.train_rows
    parts = [f"{epochs:.4g} epoch{'' if epochs == 1 else 's'}"] if epochs is not None else []
    if rows is not None:
        parts.append(f"{words.count(rows)} rows")
    return " of ".join(parts)


@dataclass(frozen=True)
class Cell:
    """One cell of a confusion table: how many rows, and their share of the rows with that true answer."""

    count: int
    share: float
    right: bool


def confusion(result: ChoiceResult) -> list[tuple[str, int, list[Cell]]]:
    """Per true answer: its name, how many rows it has, and the cells in the order of the choices."""
    table = []
    for true, (answer, counts) in enumerate(zip(result.choices, result.confusion, strict=True)):
        rows = sum(counts)
        cells = [Cell(count, count / rows if rows else 0.0, true == given) for given, count in enumerate(counts)]
        table.append((answer, rows, cells))
    return table


def bars(tests: TestSet, name: str) -> Markup | None:
    """The picture of a test set's main share before and after; None for plain text, which has none."""
    main = measured(tests)[0]
    if not main.metric.share:
        return None
    sides = [
        (title, share, interval(share, side.rows))
        for title, side, share in (("before", tests.before, main.before), ("after", tests.after, main.after))
        if side is not None and share is not None
    ]
    told = ", ".join(f"{title} {words.percent(share)}" for title, share, _ in sides)
    label = f"{main.metric.label.capitalize()}: {told}"
    guess = baseline(tests.result)
    if guess is not None:
        label += f"; {guess.name} {words.percent(guess.share)}"
    return share_bars(name, sides, guess and (guess.name, guess.share), label)


@dataclass(frozen=True)
class Answered:
    """The answers on one test set: all groups with their rows, and the template that the prompts share."""

    tests: TestSet
    groups: list[pairs.Group]
    template: prompts.Template

    @property
    def rows(self) -> int:
        """How many rows were compared."""
        return sum(len(group.pairs) for group in self.groups)

    @property
    def example(self) -> str:
        """The prompt of a row that is shown, as the model saw it."""
        rows = next((rows for group in self.groups if (rows := shown(group))), self.groups[0].pairs)
        return rows[0].shown.prompt

    @property
    def short(self) -> bool:
        """Whether true answers and given ones fit beside each other."""
        sides = [side for group in self.groups for pair in group.pairs for side in (pair.before, pair.after) if side]
        return all(len(text) <= _SHORT for side in sides for text in (side.answer, side.predicted))

    @property
    def compared(self) -> bool:
        """Whether there are answers from before and after training."""
        return all(group.before is not None and group.after is not None for group in self.groups)


def answered(sets: Sequence[TestSet]) -> list[Answered]:
    """The test sets that have predictions."""
    return [
        Answered(tests, groups, prompts.template([pair.shown.prompt for pair in pairs.pairs(tests)]))
        for tests in sets
        if (groups := pairs.groups(tests))
    ]


def shown(group: pairs.Group) -> list[pairs.Pair]:
    """The rows of a group that the page shows."""
    return pairs.sample(group.pairs, _SHOWN.get((group.before, group.after), 0))
