"""``report.html``: the files of a run folder as one page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from trimtab.data.pictures import opened
from trimtab.errors import DataError
from trimtab.hints import pasted
from trimtab.metrics import METRICS, Metric, counts_rows
from trimtab.reports.run.curves import curves, describe
from trimtab.reports.run.pairs import answered, shown
from trimtab.reports.run.run_pictures import Drawn, draw_curves, draw_numbers, draw_trials, share_bars
from trimtab.reports.run.run_tables import baseline, headline, interval, measured
from trimtab.reports.shared import words
from trimtab.reports.shared.shell import write_page
from trimtab.runs.read import Run, TestSet, read_run
from trimtab.runs.records import MetricsLine, Summary
from trimtab.runs.results import ChoiceResult, NumberResult, TagsResult

_WIDE, _NARROW = 880, 358


def write_run_page(run: Path, summary: Summary | None = None) -> Path:
    """Write ``run/report.html``, one page that needs no network, and return its path.

    The same files give the same page, byte for byte. A part whose file is missing is left out. ``summary``: what the
    run's summary is about to say, in place of its file.
    Raises RunError where ``run`` is no run folder, or where one of its files is damaged (the message names the file).
    """
    known = read_run(run)
    if summary is not None:
        known = replace(known, summary=summary)
    train, validation = known.measures("train"), known.measures("validation")
    measured_sets = [tests for tests in known.sets if tests.result]
    key_figures, checked = tiles(known, train), validated(validation)
    told = known.summary or Summary()
    data = curves(known.metrics, told.best_step, followed(checked, told), told.loss_unit)
    asking = "generate" if told.task in (None, "causal_lm") else "predict"
    curve_text = describe(data)
    values = {
        "run": known,
        "summary": known.summary,
        "plan": known.plan,
        "results": measured_sets,
        "headline": [headline(tests) for tests in measured_sets],
        "tiles": key_figures,
        "measured": measured,
        "baseline": baseline,
        "figure": words.figure,
        "bars": bars,
        "counts_rows": counts_rows,
        "numbers": numbers,
        "pieces": pieces,
        "has_images": told.counted == "pictures",
        "thumbnail": thumbnail if told.counted == "pictures" else lambda path: None,
        "confusion": confusion,
        "validated": checked,
        "curve": data,
        "curve_text": curve_text,
        # For a wide and for a narrow screen.
        "pictures": [
            (kind, draw_curves(f"curve-{kind}", data, width, curve_text))
            for kind, width in (("wide", _WIDE), ("narrow", _NARROW))
            if data.any
        ],
        "trials": draw_trials("trials", known.rate, told.loss_unit) if known.rate and known.rate.decided else None,
        "answered": answered(known.sets, pictures=told.counted == "pictures"),
        "shown": shown,
        "commands": {
            "anew": _anew(Path(run), told) if told.status == "diverged" else "",
            "resume": pasted("finetune", Path(run) / "config.yaml", "--resume"),
            "ask": pasted(asking, run, text="picture.png" if told.counted == "pictures" else "your prompt"),
            "merge": pasted("merge", run, "OUT"),
        },
    }
    return write_page(Path(run) / "report.html", "run/run.html", values)


def _anew(run: Path, summary: Summary) -> str:
    """The command that begins a diverged run again, at a third of its rate."""
    lower = [f"train.learning_rate={summary.learning_rate / 3:.1g}"] if summary.learning_rate else []
    return pasted("finetune", run / "config.yaml", "--overwrite", *lower)


def validated(validation: Sequence[MetricsLine]) -> list[Metric]:
    """The metrics besides the loss that the validations took, the main one first."""
    taken = {name for line in validation for name, value in line.figures.items() if value is not None}
    return [METRICS[name] for name in METRICS if name in taken]


def followed(checked: Sequence[Metric], summary: Summary) -> Metric | None:
    """The metric of the validations that is drawn: the one by which a step was to be kept, or else the main one."""
    chosen = [metric for metric in checked if metric.name == summary.settings.get("train.metric")]
    return next(iter([*chosen, *checked]), None)


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
        there, machine = summary.peak_device_memory_gib, summary.machine
        peak, whole = (
            (summary.peak_memory_gib, machine.memory_gib) if there is None else (there, machine.device_memory_gib)
        )
        note = f"of {words.gib(whole, 1)}" if whole else ""
        if there is not None:
            note = f"{note} on {machine.device}; {words.gib(summary.peak_memory_gib, 1)} of the machine's".strip()
        known.append(Tile("Peak memory", words.gib(peak, 2 if peak < 1 else 1), note))
    speeds = [measure.tokens_per_second for measure in train if measure.tokens_per_second]
    if speeds:
        counted = (summary.counted if summary else "tokens").capitalize()
        known.append(
            Tile(f"{counted} per second", words.count(round(statistics.median(speeds))), "median while training")
        )
    steps = summary.steps if summary else None
    if steps is None:
        steps = max((measure.step for measure in train), default=None)
    if steps is not None:
        parts = []
        if summary and summary.epochs is not None:
            parts.append(f"{summary.epochs:.4g} epoch{'' if summary.epochs == 1 else 's'}")
        if summary and summary.train_rows is not None:
            parts.append(words.counted(summary.train_rows, "row"))
        known.append(Tile("Steps", words.count(steps), " of ".join(parts)))
    return known


@dataclass(frozen=True)
class Cell:
    """One cell of a confusion table: how many rows, and their share of the rows with that true answer."""

    count: int
    share: float
    right: bool


class Line(NamedTuple):
    """A line of a confusion table: a true answer, how many rows have it, the cells in the order of the choices, and
    how many rows were given an answer that cannot be used."""

    answer: str
    rows: int
    cells: list[Cell]
    unusable: int


def confusion(result: ChoiceResult | TagsResult) -> list[Line]:
    """A line for each true answer."""
    table = []
    for true, (answer, counts) in enumerate(zip(result.choices, result.confusion, strict=True)):
        rows = max(sum(counts), result.per_class[answer].rows if answer in result.per_class else 0)
        cells = [Cell(count, count / rows if rows else 0.0, true == given) for given, count in enumerate(counts)]
        table.append(Line(answer, rows, cells, rows - sum(counts)))
    return table


def numbers(tests: TestSet, name: str) -> Drawn | None:
    """The picture of numbers over the true ones; None where answers are no numbers."""
    if not isinstance(tests.result, NumberResult):
        return None
    before, after = (
        [(float(row.answer), float(row.predicted)) for row in rows] for rows in (tests.rows_before, tests.rows_after)
    )
    if not before and not after:
        return None
    main = measured(tests)[0]
    return draw_numbers(name, before, after, f"Numbers given over the true ones. {main.metric.label}: {main.course}")


def bars(tests: TestSet, name: str) -> Markup | None:
    """The picture of a test set's main share before and after; None for plain text, which has none."""
    main = measured(tests)[0]
    if not main.metric.share:
        return None
    sides = [
        (title, share, interval(share, side.rows) if counts_rows(side.kind) else (share, share))
        for title, side, share in (("before", tests.before, main.before), ("after", tests.after, main.after))
        if side is not None and share is not None
    ]
    told = ", ".join(f"{title} {words.percent(share)}" for title, share, _ in sides)
    label = f"{words.headed(main.metric.label)}: {told}"
    guess = baseline(tests.result)
    if guess is not None:
        label += f"; {guess.name} {guess.told}"
    return share_bars(name, sides, guess and (guess.name, guess.value), label)


SIDE = 72
"""CSS pixels of the longer side."""


def thumbnail(path: str) -> Markup | None:
    """The picture at ``path`` as an image of the page; None where it is not there any more, or is none."""
    if not Path(path).is_file():
        return None
    try:
        image = opened("", path, b"")
    except DataError:
        return None
    kept = io.BytesIO()
    if max(image.size) > 2 * SIDE:  # twice as fine as the page, for screens that are
        image.thumbnail((2 * SIDE, 2 * SIDE))
    width, height = (max(1, round(side * SIDE / max(image.size))) for side in image.size)
    image.save(kept, "png", optimize=True)
    data = base64.b64encode(kept.getvalue()).decode()
    return Markup('<img class="thumbnail" width="{}" height="{}" alt="" src="data:image/png;base64,{}">').format(
        width, height, data
    )


COLOURS = 6
"""Pairs of ink and ground that the style sheet has, ``tag-0`` and on."""

_BEGIN, _INSIDE, _OUTSIDE = "BSU", "IEL", "O"


class Piece(NamedTuple):
    """Words in a row under one ``tag``; empty for none. ``colour``: the number of its colour."""

    text: str
    tag: str
    colour: int


def pieces(words: Sequence[str], tags: str, kinds: Sequence[str]) -> list[Piece]:
    """``words`` with their ``tags``, which stand in one text with a space between them.

    Tags that mark entities (``B-PER I-PER``, also as IOBES or BILOU) become one piece for each entity, under its kind;
    any other tag is a piece of its own for each word. ``kinds``: all kinds or tags, which decides the colours.
    """
    colours = {kind: number % COLOURS for number, kind in enumerate(kinds)}
    found: list[Piece] = []
    open_kind = ""
    for word, tag in zip_longest(words, tags.split(" ")[: len(words)], fillvalue=_OUTSIDE):
        mark, _, kind = tag.partition("-") if tag[1:2] == "-" else (tag, "", "")
        if tag == _OUTSIDE:
            open_kind = ""
            found.append(Piece(word, "", 0))
        elif kind and mark in _INSIDE and kind == open_kind:
            found[-1] = found[-1]._replace(text=f"{found[-1].text} {word}")
        else:
            open_kind = kind if kind and mark in _BEGIN + _INSIDE else ""
            name = kind or tag
            found.append(Piece(word, name, colours.get(name, 0)))
    return found
