"""``report.html``: the files of a run folder as one page that needs nothing but itself."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from trimtab import files
from trimtab.reports import answers, prompts, words
from trimtab.reports.curves import Curves, curves, describe, draw
from trimtab.reports.folder import Choice, Generation, MultipleChoice, Result, Run, TestSet, read_run
from trimtab.reports.plots import share_bars

_HERE = Path(__file__).parent
_WIDE, _NARROW = 880, 358
# Letters of a prompt or an answer that a page shows; the whole text is in the folder of predictions.
_PROMPT_LETTERS, _ANSWER_LETTERS, _EXAMPLE_LETTERS = 360, 240, 3000
# Up to so many letters, answers stand beside each other rather than below.
_SHORT = 14
# Rows shown of each group: those that training put right first of all.
_SHOWN = {
    (False, True): 4,
    (True, False): 3,
    (False, False): 3,
    (None, False): 4,
    (None, True): 3,
    (False, None): 3,
    (True, None): 3,
}


@dataclass(frozen=True)
class Tile:
    """One key figure: what it is, the figure, and a line that puts it in proportion."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class MeasureRow:
    """One measure of a test set, before and after, ready to be read."""

    name: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Cell:
    """One cell of a confusion table: how many rows, and their share of the rows with that true answer."""

    count: int
    share: float
    right: bool


def write_page(run: Path) -> Path:
    """Write ``run/report.html`` and return its path. Raises RunError as ``read_run`` does."""
    target = Path(run) / "report.html"
    # Half a surrogate pair is a legal JSON string and cannot be written as UTF-8.
    page = render(read_run(run)).encode("utf-8", "replace").decode("utf-8")
    files.write_text(target, page)
    return target


def render(run: Run) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent,
        small_percent=words.small_percent,
        count=words.count,
        number=words.number,
        duration=words.duration,
        listing=words.listing,
        options=words.options,
        date=_date,
        prompt=lambda text: words.clean(words.shorten(text, _PROMPT_LETTERS)),
        answer=lambda text: words.clean(words.shorten(text, _ANSWER_LETTERS)),
        example=lambda text: words.clean(words.shorten(text, _EXAMPLE_LETTERS)),
        clean=words.clean,
        glued=lambda text: text.replace(" %", "\u00a0%"),
    )
    environment.globals.update(
        measure_rows=measure_rows, confusion=confusion, bars=bars, interval=words.interval, shown=shown
    )
    data = curves(run.metrics, run.summary.best_step if run.summary else None)
    return environment.get_template("report.html").render(
        run=run,
        summary=run.summary,
        plan=run.plan,
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        results=[tests for tests in run.sets if tests.result],
        headline=[headline(tests) for tests in run.sets if tests.result],
        tiles=tiles(run),
        curve=data,
        curve_text=describe(data),
        pictures=pictures(data),
        answered=answered(run.sets),
        paths={"run": shlex.quote(str(run.path)), "config": shlex.quote(str(run.path / "config.yaml"))},
    )


@dataclass(frozen=True)
class Headline:
    """The result on one test set: the figures, and what to hold them against (may be empty)."""

    name: str
    figures: str
    beside: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.figures}" + (f"; {self.beside}" if self.beside else "")


def headline(tests: TestSet) -> Headline:
    """The main measure of a test set before and after, in words."""
    before, after, result = tests.before, tests.after, tests.result
    if isinstance(result, Choice | MultipleChoice):
        shares = [side.accuracy if isinstance(side, Choice | MultipleChoice) else None for side in (before, after)]
        beside = ""
        if isinstance(result, MultipleChoice):
            beside = f"guessing would give {words.percent(result.chance)}"
        elif result.majority:
            answer = words.clean(words.shorten(result.majority.answer, 40))
            beside = f"always answering '{answer}' would give {words.percent(result.majority.accuracy)}"
        return Headline(tests.name, _before_after(shares, words.percent), beside)
    if isinstance(result, Generation):
        shares = [side.exact_match if isinstance(side, Generation) else None for side in (before, after)]
        beside = f"{words.percent(result.unusable)} of the answers cannot be used" if result.unusable else ""
        return Headline(tests.name, f"exact match {_before_after(shares, words.percent)}", beside)
    values = [side.perplexity if side else None for side in (before, after)]
    return Headline(tests.name, f"perplexity {_before_after(values, words.number)}")


def _before_after(values: Sequence[float | None], form: Callable[[float | None], str]) -> str:
    before, after = values
    if before is None:
        return f"{form(after)} after training"
    if after is None:
        return f"{form(before)} before, not measured after"
    return f"{form(before)} before, {form(after)} after"


def tiles(run: Run) -> list[Tile]:
    """The key figures that the run knows."""
    summary, plan = run.summary, run.plan
    found = []
    sizes = plan or (summary if summary and summary.trainable_parameters and summary.total_parameters else None)
    if sizes:
        trained, total = sizes.trainable_parameters or 0, sizes.total_parameters or 0
        note = f"{words.small_percent(trained, total)} of {words.count(total)}"
        found.append(Tile("Trained parameters", words.count(trained), note))
    if summary and summary.adapter_bytes is not None:
        found.append(Tile("Adapter on disk", words.size(summary.adapter_bytes), "in the folder adapter"))
    if summary and summary.training_seconds is not None:
        note = f"{words.duration(summary.total_seconds)} in all" if summary.total_seconds is not None else ""
        found.append(Tile("Training time", words.duration(summary.training_seconds), note))
    if summary and summary.peak_memory_gib is not None:
        whole = summary.machine.memory_gib
        found.append(Tile("Peak memory", f"{summary.peak_memory_gib:.1f} GiB", f"of {whole:.1f} GiB" if whole else ""))
    speeds = [measure.tokens_per_second for measure in run.measures("train") if measure.tokens_per_second]
    if speeds:
        found.append(Tile("Tokens per second", words.count(round(statistics.median(speeds))), "median while training"))
    steps = (
        summary.steps
        if summary and summary.steps is not None
        else max((m.step for m in run.measures("train")), default=None)
    )
    if steps is not None:
        found.append(Tile("Steps", words.count(steps), _steps_note(run)))
    return found


def _steps_note(run: Run) -> str:
    if not run.summary:
        return ""
    epochs, rows = run.summary.epochs, run.summary.train_rows
    parts = [f"{epochs:.4g} epoch{'' if epochs == 1 else 's'}"] if epochs is not None else []
    if rows is not None:
        parts.append(f"{words.count(rows)} rows")
    return " of ".join(parts)


def measure_rows(tests: TestSet) -> list[MeasureRow]:
    """The measures of one test set: shares with their change in points, perplexity with its change in percent."""
    shares = {
        "choice": {"Accuracy": "accuracy", "Macro F1": "macro_f1", "Weighted F1": "weighted_f1"},
        "multiple_choice": {"Accuracy": "accuracy", "Accuracy by likelihood per character": "accuracy_norm"},
        "generation": {"Exact match": "exact_match", "Unusable answers": "unusable"},
        "perplexity": {},
    }
    result = tests.result
    assert result is not None, "only test sets with a result have measures"
    rows = []
    for title, key in shares[result.kind].items():
        before, after = (getattr(side, key) if side else None for side in (tests.before, tests.after))
        rows.append(MeasureRow(title, words.percent(before), words.percent(after), words.points(before, after)))
    before, after = (side.perplexity if side else None for side in (tests.before, tests.after))
    if before is not None or after is not None:
        change = f"{words.signed(100 * (after / before - 1), 1)} %" if before and after else words.DASH
        title = "Perplexity" if result.kind == "perplexity" else "Perplexity of the true answers"
        rows.append(MeasureRow(title, words.number(before), words.number(after), change))
    return rows


def confusion(result: Choice) -> list[tuple[str, int, list[Cell]]]:
    """Per true answer: its name, how many rows it has, and the cells in the order of the choices."""
    table = []
    for true, (answer, counts) in enumerate(zip(result.choices, result.confusion, strict=True)):
        rows = sum(counts)
        cells = [Cell(count, count / rows if rows else 0.0, true == given) for given, count in enumerate(counts)]
        table.append((answer, rows, cells))
    return table


def bars(tests: TestSet, name: str) -> Markup | None:
    """The picture of a test set's main share before and after; None for plain text, which has none."""
    found = []
    for title, side in (("before", tests.before), ("after", tests.after)):
        if side is not None and side.kind != "perplexity":
            share = side.exact_match if isinstance(side, Generation) else side.accuracy
            found.append((title, share, words.interval(share, side.rows)))
    if not found:
        return None
    baseline = _baseline(tests.result)
    what = "Exact match" if isinstance(tests.result, Generation) else "Accuracy"
    label = f"{what}: " + ", ".join(f"{title} {words.percent(share)}" for title, share, _ in found)
    if baseline is not None:
        label += f"; {baseline[0]} {words.percent(baseline[1])}"
    return share_bars(name, found, baseline, label)


def _baseline(result: Result | None) -> tuple[str, float] | None:
    """What answers without a look at the rows reach: how they come about, and the share that is right."""
    if isinstance(result, MultipleChoice):
        return "guessing", result.chance
    if isinstance(result, Choice) and result.majority:
        return "commonest answer", result.majority.accuracy
    return None


def pictures(data: Curves) -> list[tuple[str, Markup]]:
    """The learning curves for a wide and for a narrow screen; none where there is nothing to draw."""
    if not data.any:
        return []
    return [("wide", draw("curve-wide", data, _WIDE)), ("narrow", draw("curve-narrow", data, _NARROW))]


@dataclass(frozen=True)
class Answered:
    """The answers on one test set: all groups with their rows, and the template that the prompts share."""

    tests: TestSet
    groups: list[answers.Group]
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
        Answered(tests, groups, prompts.template(answers.shown_prompts([tests])))
        for tests in sets
        if (groups := answers.groups(tests))
    ]


def shown(group: answers.Group) -> list[answers.Pair]:
    """The rows of a group that the page shows; none of those that were right all along."""
    return answers.sample(group.pairs, _SHOWN.get((group.before, group.after), 0))


def _date(moment: datetime) -> str:
    text = f"{moment.day} {moment:%B %Y, %H:%M}"
    return f"{text} {moment.tzname()}" if moment.tzinfo else text
