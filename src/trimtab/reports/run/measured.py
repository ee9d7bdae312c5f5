"""What was measured on a test set before and after training, in words: shared by the page and the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.reports.folder import Choice, Generation, MultipleChoice, Result, TestSet
from trimtab.reports.shared import words

# Kind of result -> what it measures, the main one first: key, name, and whether a terminal has room for it.
_MEASURES: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "choice": (
        ("accuracy", "accuracy", True),
        ("macro_f1", "macro F1", True),
        ("weighted_f1", "weighted F1", False),
        ("perplexity", "perplexity", False),
    ),
    "multiple_choice": (
        ("accuracy", "accuracy", True),
        ("accuracy_norm", "accuracy per character", True),
        ("perplexity", "perplexity", True),
    ),
    "generation": (
        ("exact_match", "exact match", True),
        ("unusable", "unusable", True),
        ("perplexity", "perplexity", True),
    ),
    "perplexity": (("perplexity", "perplexity", True),),
}


@dataclass(frozen=True)
class Measured:
    """One measure of a test set; a side that was not measured is None."""

    key: str
    name: str
    brief: bool
    before: float | None
    after: float | None

    def words(self, value: float | None) -> str:
        """``value`` as this measure is given: a share in percent, a perplexity as a number."""
        return words.number(value) if self.key == "perplexity" else words.percent(value)

    @property
    def change(self) -> str:
        """The change of a share in points, that of a perplexity in percent."""
        if self.key != "perplexity":
            return words.points(self.before, self.after)
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
    """The measures of a test set, the main one first; a perplexity only where one was taken."""
    assert tests.result is not None, "only test sets with a result have measures"
    rows = [
        Measured(key, name, brief, *(getattr(side, key) if side else None for side in (tests.before, tests.after)))
        for key, name, brief in _MEASURES[tests.result.kind]
    ]
    return [row for row in rows if row.key != "perplexity" or row.before is not None or row.after is not None]


class Baseline(NamedTuple):
    """What answers without a look at the rows reach: what it is called, the share that is right, how such answers come
    about, and that in two words at most."""

    name: str
    share: float
    how: str
    brief: str


def baseline(result: Result | None) -> Baseline | None:
    """What ``result`` is to be held against; None where nothing can be guessed."""
    if isinstance(result, MultipleChoice):
        return Baseline("guessing", result.chance, "guessing", "chance")
    if isinstance(result, Choice) and result.majority:
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
    name = "" if main.key == "accuracy" else f"{main.name} "
    beside = ""
    if guess := baseline(result):
        beside = f"{guess.how} would give {words.percent(guess.share)}"
    elif isinstance(result, Generation) and result.unusable:
        beside = f"{words.percent(result.unusable)} of the answers cannot be used"
    return Headline(tests.name, f"{name}{main.course}", beside)


def interval(share: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share that was counted on ``rows`` rows (Wilson's; it stays within 0 and 1)."""
    if rows <= 0:
        return 0.0, 1.0
    z = 1.959964
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)
