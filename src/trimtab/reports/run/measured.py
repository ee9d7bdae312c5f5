"""What was measured on a test set before and after training, in words: shared by the page and the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.metrics import Metric, main_metric, of_kind
from trimtab.reports.shared import words
from trimtab.runs.read import TestSet
from trimtab.runs.results import ChoiceResult, MultipleChoiceResult, NumberResult, Result


@dataclass(frozen=True)
class Measured:
    """One metric of a test set; a side that was not measured is None. ``brief``: a terminal has room for it."""

    metric: Metric
    brief: bool
    before: float | None
    after: float | None

    def words(self, value: float | None) -> str:
        """``value`` as this metric is given: a share in percent, any other as a number."""
        return words.percent(value) if self.metric.share else words.number(value)

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
    """What answers without a look at the rows reach: what it is called, the share that is right, how such answers come
    about, and that in two words at most."""

    name: str
    share: float
    how: str
    brief: str


def baseline(result: Result | None) -> Baseline | None:
    """What ``result`` is to be held against; None where nothing can be guessed."""
    if isinstance(result, MultipleChoiceResult):
        return Baseline("guessing", result.chance, "guessing", "chance")
    if isinstance(result, ChoiceResult) and result.majority:
        answer = words.shorten(result.majority.answer, 40)
        how = f"always answering '{answer}'"
        return Baseline("commonest answer", result.majority.accuracy, how, f"always {answer}")
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
        beside = f"{guess.how} would give {words.percent(guess.share)}"
    elif isinstance(result, NumberResult):
        beside = f"always answering the mean would give {words.number(result.spread)}"
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
