"""What was measured before and after training in words, and the closing tables of the terminal: results, some answers,
the plan. The page says it in the same words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from trimtab.errors import printable
from trimtab.metrics import Metric, main_metric, of_kind
from trimtab.reports.run.pairs import answered
from trimtab.reports.shared import words
from trimtab.runs.read import Run, TestSet
from trimtab.runs.records import PlanRecord, SourceRecord
from trimtab.runs.results import ChoiceResult, MultipleChoiceResult, NumberResult, Prediction, Result, TagsResult


@dataclass(frozen=True)
class Measured:
    """One metric of a test set; a side that was not measured is None. ``brief``: a terminal has room for it."""

    metric: Metric
    brief: bool
    before: float | None
    after: float | None

    def words(self, value: float | None) -> str:
        return words.figure(self.metric, value)

    @property
    def change(self) -> str:
        """The change of a share in points, that of a number in percent; of a correlation, which may be 0 or below, what
        it grew by."""
        if self.metric.share:
            return words.points(self.before, self.after)
        if self.metric.higher_is_better and self.before is not None and self.after is not None:
            return words.signed(self.after - self.before, 3)
        if not self.before or not self.after:
            return words.DASH
        return f"{words.signed(100 * (self.after / self.before - 1), 1)} %"

    @property
    def course(self) -> str:
        """``33.3 % before, 66.7 % after``."""
        if self.before is None:
            return f"{self.words(self.after)} after training"
        if self.after is None:
            return f"{self.words(self.before)} before, not measured after"
        return f"{self.words(self.before)} before, {self.words(self.after)} after"


def measured(tests: TestSet) -> list[Measured]:
    """The metrics that a test set was measured by, the main one first."""
    assert tests.result is not None, "only test sets with a result have metrics"
    sides = [side.figures if side else {} for side in (tests.before, tests.after)]
    main, kind = main_metric(tests.result.kind), tests.result.kind
    return [
        Measured(metric, kind in metric.in_terminal, *(side.get(metric.name) for side in sides))
        for metric in of_kind(kind)
        if metric is main or any(side.get(metric.name) is not None for side in sides)
    ]


class Baseline(NamedTuple):
    """What answers without a look at the rows reach in the main metric: what it is called, how such answers come about,
    and that in two words at most."""

    name: str
    metric: Metric
    value: float
    how: str
    brief: str

    @property
    def told(self) -> str:
        return words.figure(self.metric, self.value)

    def reaches(self, value: float | None) -> bool:
        """Whether ``value`` is no better."""
        return value is not None and self.metric.cost(self.value) <= self.metric.cost(value)


def baseline(result: Result | None) -> Baseline | None:
    """What ``result`` is to be held against; None where nothing can be guessed."""
    if result is None:
        return None
    main = main_metric(result.kind)
    if isinstance(result, MultipleChoiceResult):
        return Baseline("guessing", main, result.chance, "guessing", "chance")
    if isinstance(result, ChoiceResult | TagsResult) and result.majority:
        answer = words.shorten(result.majority.answer, 40)
        how = f"always answering '{answer}'"
        return Baseline("commonest answer", main, result.majority.accuracy, how, f"always {answer}")
    if isinstance(result, NumberResult):
        return Baseline("mean", main, result.spread, "always answering the mean", "the mean")
    return None


class Headline(NamedTuple):
    """The result on one test set: the figures, and what to hold them against (may be empty)."""

    name: str
    figures: str
    beside: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.figures}" + (f"; {self.beside}" if self.beside else "")


def headline(tests: TestSet) -> Headline:
    """The main measure of a test set before and after, in words."""
    main, result = measured(tests)[0], tests.result
    name = "" if main.metric.name == "accuracy" else f"{main.metric.label} "
    beside = ""
    if guess := baseline(result):
        beside = f"{guess.how} would give {guess.told}"
    elif result is not None and (unusable := result.figures.get("unusable")):
        beside = f"{words.percent(unusable)} of the answers cannot be used"
    return Headline(tests.name, f"{name}{main.course}", beside)


def interval(share: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share that was counted on ``rows`` rows (Wilson's; it stays within 0 and 1)."""
    if rows <= 0 or not 0 <= share <= 1:  # of a damaged record
        return 0.0, 1.0
    z = 1.959964
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)


# Letters of a prompt and of an answer in a terminal's row. The narrow columns leave the prompt room in 80 letters.
_PROMPT_LETTERS, _ANSWER_LETTERS, _ANSWER_WIDTH, _PROMPT_WIDTH = 120, 40, 17, 16
MOST_CLASSES = 12
"""Classes whose confusion a terminal has room for."""


def results_table(run: Run) -> Table:
    """One line per test set and measure: before, after, the change, and what the commonest answer or guessing gives."""
    table = _table()
    for title in ("test set", "measure"):
        table.add_column(title)
    for title in ("rows", "before", "after", "change", "baseline"):
        table.add_column(title, justify="right")
    for tests in run.sets:
        if tests.result is None:
            continue
        guess = baseline(tests.result)
        for place, row in enumerate(row for row in measured(tests) if row.brief):
            figures: list[str | Text] = [row.words(row.before), Text(row.words(row.after), style="bold"), row.change]
            if place:
                table.add_row("", row.metric.label, "", *figures)
                continue
            beside = f"{guess.told} ({guess.brief})" if guess else ""
            rows = words.count(tests.result.rows)
            table.add_row(_text(tests.name), row.metric.label, rows, *figures, _text(beside))
        table.add_section()
    return table


def answers_table(run: Run, count: int = 5) -> Table:
    """About ``count`` rows with the true answer and those given before and after, most of them rows that changed.

    Several test sets share the rows, at least one each.
    """
    sets = answered(run.sets, pictures=run.summary is not None and run.summary.counted == "pictures")
    several = len(sets) > 1
    compared = any(one.tests.rows_before for one in sets)
    table = _table(expand=True)
    if several:
        table.add_column("test set")
    table.add_column("row", justify="right")
    table.add_column("prompt", ratio=1, min_width=_PROMPT_WIDTH)
    for title in ("true answer", "before", "after") if compared else ("true answer", "after"):
        table.add_column(title, max_width=_ANSWER_WIDTH, overflow="fold")
    for place, one in enumerate(sets):
        share = max(1, count // len(sets) + (place < count % len(sets)))
        for pair in one.mixed(share):
            cells = [_text(one.tests.name)] if several else []
            own = one.template.own_words(pair.shown.prompt)
            cells += [Text(words.count(pair.shown.row)), _short(own, _PROMPT_LETTERS)]
            cells.append(_short(pair.shown.answer, _ANSWER_LETTERS))
            if compared:
                cells.append(_answer(pair.before))
            cells.append(_answer(pair.after))
            table.add_row(*cells)
        table.add_section()
    return table


def _answer(prediction: Prediction | None) -> Text:
    if prediction is None:
        return Text(words.DASH)
    sign, style = {True: ("✓ ", "green"), False: ("✗ ", "red"), None: ("", "")}[prediction.correct]
    text = Text(sign, style=style)
    if prediction.predicted.strip():
        return text.append(_short(prediction.predicted, _ANSWER_LETTERS))
    return text.append("nothing", style="italic")


def evaluation_table(result: Result) -> Table:
    """The figures of one evaluation result, a line each."""
    table = _table()
    for title in (result.dataset, "value"):
        table.add_column(_text(title), justify="right" if title == "value" else "left", overflow="fold")
    lines = [(name, text) for name, text in (("model", result.model), ("adapter", result.adapter)) if text]
    lines.append(("rows", words.count(result.rows)))
    if result.cut:
        lines.append(("rows cut to what the model reads", words.count(result.cut)))
    if result.left_out:
        lines.append(("rows left out of the perplexity", words.count(result.left_out)))
    numbers: list[tuple[str, str]] = []
    for metric in of_kind(result.kind):
        value = result.figures.get(metric.name)
        if value is not None or not metric.share:
            (lines if metric.share else numbers).append((metric.described, words.figure(metric, value)))
    if guess := baseline(result):
        (lines if guess.metric.share else numbers).append((guess.how, guess.told))
    for name, text in [*lines, *numbers, ("seconds", words.number(result.seconds))]:
        table.add_row(_text(name), text)
    return table


def confusion_table(result: ChoiceResult) -> Table:
    """How often each true answer was taken for which, and how often what was written could not be used."""
    table = _table(title=_text("true answer down, predicted across"), title_justify="left")
    table.add_column("")
    for choice in result.choices:
        table.add_column(_text(choice), justify="right")
    unusable = bool(result.figures.get("unusable"))
    if unusable:
        table.add_column(Text("unusable", style="italic"), justify="right")
    for place, (choice, row) in enumerate(zip(result.choices, result.confusion, strict=True)):
        cells = [Text(words.count(number), style="bold" if at == place else "") for at, number in enumerate(row)]
        if unusable:
            cells.append(Text(words.count(result.per_class[choice].rows - sum(row))))
        table.add_row(_text(choice), *cells)
    return table


def questions_table(result: Result) -> Table:
    """The figures of each question of a result whose rows ask different things."""
    table = _table()
    table.add_column("question", overflow="fold")
    shown = [metric for metric in of_kind("choice") if any(metric.name in asked.figures for asked in result.questions)]
    for title in ("rows", *(metric.label for metric in shown)):
        table.add_column(title, justify="right")
    for asked in result.questions:
        shares = (words.percent(asked.figures.get(metric.name)) for metric in shown)
        table.add_row(_text(asked.question), words.count(asked.rows), *shares)
    return table


def plan_table(known: PlanRecord) -> Table:
    """One line per rule of a plan, and a line for all of them."""
    table = _table(show_footer=True)
    of_all = words.small_percent(known.trainable_parameters, known.total_parameters)
    table.add_column("rule", justify="right")
    table.add_column("method", footer="in all")
    table.add_column("match", overflow="fold")
    table.add_column("layers")
    table.add_column("options", overflow="fold")
    figures: dict[str, Any] = {"justify": "right", "no_wrap": True}
    table.add_column("modules", footer=words.count(sum(rule.modules for rule in known.rules)), **figures)
    table.add_column("parameters", footer=words.count(known.trainable_parameters), **figures)
    table.add_column("percent", footer=of_all, **figures)
    for rule in known.rules:
        options = ", ".join(words.options(rule.options)) or words.DASH
        said = (rule.method, "\n".join(words.listing(rule.match)), str(rule.layers), options)
        share = words.small_percent(rule.parameters, known.total_parameters)
        table.add_row(str(rule.rule), *map(_text, said), words.count(rule.modules), words.count(rule.parameters), share)
    return table


def sources_table(sources: Sequence[SourceRecord]) -> Table:
    """What was taken of each source of training rows, and in all."""
    table = _table(show_footer=True)
    table.add_column("rows from", footer="in all", overflow="fold")
    table.add_column("form", overflow="fold")
    figures: dict[str, Any] = {"justify": "right", "no_wrap": True}
    table.add_column("rows", footer=words.count(sum(source.rows for source in sources)), **figures)
    table.add_column("to train on", footer=words.count(sum(source.training for source in sources)), **figures)
    table.add_column("weight", **figures)
    table.add_column("in an epoch", footer=words.count(sum(source.an_epoch for source in sources)), **figures)
    for source in sources:
        counts = (words.count(source.rows), words.count(source.training), f"{source.weight:g}")
        said = (_text(source.shown), _text(", ".join(source.forms)))
        table.add_row(*said, *counts, words.count(source.an_epoch))
    return table


def _table(**settings: Any) -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, **settings)


def _text(text: str) -> Text:
    """Text from data: never markup, never a control character."""
    return Text(printable(text))


def _short(text: str, limit: int) -> Text:
    return _text(" ".join(words.shorten(text, limit).split()))


_MEMORY_PARTS = {
    "weights": "frozen weights",
    "adapters": "trained tensors",
    "gradients": "gradients",
    "optimiser": "optimiser",
    "activations": "activations",
    "fragmentation": "free between them (allocator)",
    "files": "weight files, while they are converted",
    "process": "Python and libraries",
}


def memory_table(memory: Mapping[str, Any]) -> Table:
    """GiB by what they are for at each moment of a run, as ``trimtab plan`` estimates them."""
    moments = memory["moments"]
    table = _table(show_footer=True)
    table.add_column("memory, GiB", footer="in all")
    for moment, parts in moments.items():
        table.add_column(moment, footer=f"{sum(parts.values()):.2f}", justify="right", no_wrap=True)
    for part, name in _MEMORY_PARTS.items():
        if any(part in parts for parts in moments.values()):
            table.add_row(name, *(f"{parts[part]:.2f}" if part in parts else "" for parts in moments.values()))
    return table


def memory_lines(memory: Mapping[str, Any]) -> list[str]:
    """Whether the run fits, for which batches that is said, and what would make it fit."""
    rows, length = memory["batch_size"], memory["length"]
    shape = " x ".join(map(str, memory.get("shape", ())))
    lines = [
        f"for batches of {rows} pictures of {shape}"
        if shape
        else f"for batches of {rows} rows of {length} tokens ({memory['length_from']})"
    ]
    if (processes := memory.get("processes", 1)) > 1:
        lines[0] = f"each of {processes} processes: {lines[0]}"
    if memory["uncounted"]:
        lines.append(f"without the activations, which could not be counted: {memory['uncounted']}")
    need = f"{words.gib(memory['needed'])} beyond Python and libraries, {words.gib(memory['free'])} are free"
    if "device" in memory:
        host = memory["host"]
        need = (
            f"{words.gib(memory['needed'])} on {memory['device']}, {words.gib(memory['free'])} are free there; loading "
            f"takes {words.gib(host['needed'])} of the machine's own, {words.gib(host['free'])} are free"
        )
    if memory["fits"]:
        return [*lines, f"it fits: {need}"]
    lines.append(f"it does not fit: {need}")
    if not memory["suggestions"]:
        return [*lines, "no change of batch, length or storage would make it fit: it takes a smaller model"]
    changes = [f"  {one['change']}: {words.gib(one['needed'])}" for one in memory["suggestions"]]
    return [*lines, "it would fit with", *changes]
