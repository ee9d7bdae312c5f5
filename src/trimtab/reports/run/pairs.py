"""Rows of a test set before and after training: how many moved, and which few are worth showing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.reports.run import prompts
from trimtab.runs.read import TestSet
from trimtab.runs.results import Prediction

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
    (None, None): 8,
}


@dataclass(frozen=True)
class Pair:
    """One row with what was answered before and after; either may be missing, not both."""

    before: Prediction | None
    after: Prediction | None

    @property
    def shown(self) -> Prediction:
        """The side that tells the prompt and the true answer."""
        side = self.after or self.before
        assert side is not None, "a pair has at least one side"
        return side


@dataclass(frozen=True)
class Group:
    """Rows that went the same way. ``before`` and ``after`` say whether they were right; None: not measured, or neither
    right nor wrong."""

    before: bool | None
    after: bool | None
    pairs: list[Pair]

    @property
    def title(self) -> str:
        """The group in words."""
        return _TITLES[self.before, self.after]


_TITLES: dict[tuple[bool | None, bool | None], str] = {
    (False, True): "Wrong before, right now",
    (True, False): "Right before, wrong now",
    (False, False): "Wrong before and still wrong",
    (True, True): "Right before and still right",
    (None, False): "Wrong",
    (None, True): "Right",
    (False, None): "Wrong before training",
    (True, None): "Right before training",
    (None, None): "Some rows",
}


def pairs(tests: TestSet) -> list[Pair]:
    """The rows of a test set in order. With both sides, only rows that both have can be compared."""
    before = {row.row: row for row in tests.rows_before}
    after = {row.row: row for row in tests.rows_after}
    known = before.keys() & after.keys() or before.keys() | after.keys()
    return [Pair(before.get(row), after.get(row)) for row in sorted(known)]


def groups(tests: TestSet) -> list[Group]:
    """The groups that have rows, in the order of the titles: what was won, what was lost, what stays wrong or right."""
    by_course: dict[tuple[bool | None, bool | None], list[Pair]] = {course: [] for course in _TITLES}
    for pair in pairs(tests):
        course = (pair.before.correct if pair.before else None, pair.after.correct if pair.after else None)
        by_course[course].append(pair)
    return [Group(*course, rows) for course, rows in by_course.items() if rows]


def sample(rows: list[Pair], count: int) -> list[Pair]:
    """``count`` of ``rows``: every true answer in turn, and for each of them spread over the whole file."""
    by_answer: dict[str, list[Pair]] = {}
    for pair in rows:
        by_answer.setdefault(pair.shown.answer, []).append(pair)
    # Answers that are all different tell nothing about variety, and then the spread over the file decides.
    if len(by_answer) > count:
        return _spread(rows, count)
    shares = dict.fromkeys(by_answer, 0)
    while sum(shares.values()) < min(count, len(rows)):
        for answer, members in by_answer.items():
            if shares[answer] < len(members) and sum(shares.values()) < count:
                shares[answer] += 1
    chosen = [pair for answer, members in by_answer.items() for pair in _spread(members, shares[answer])]
    return sorted(chosen, key=lambda pair: pair.shown.row)


def mixed(tests: TestSet, count: int) -> list[Pair]:
    """``count`` rows over all groups, most of them rows that changed: for a reader who sees these alone."""
    # Taken in turn, so that one group with few rows leaves its places to the others.
    queues = [list(sample(group.pairs, count)) for group in groups(tests)]
    weights = [2 if group.before is False and group.after is True else 1 for group in groups(tests)]
    chosen: list[Pair] = []
    while len(chosen) < count and any(queues):
        for queue, weight in zip(queues, weights, strict=True):
            chosen += queue[:weight]
            del queue[:weight]
    return chosen[:count]


def _spread(rows: list[Pair], count: int) -> list[Pair]:
    count = min(count, len(rows))
    return [rows[(2 * place + 1) * len(rows) // (2 * count)] for place in range(count)]


@dataclass(frozen=True)
class Answered:
    """The answers on one test set: all groups with their rows, and the template that the prompts share."""

    tests: TestSet
    groups: list[Group]
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
    def kinds(self) -> list[str]:
        """The kinds of entities, or the tags, where each word has one."""
        return list(getattr(self.tests.result, "per_class", ()))

    @property
    def judged(self) -> bool:
        """Whether answers are right or wrong, and not nearer or farther."""
        return all((group.before, group.after) != (None, None) for group in self.groups)

    @property
    def compared(self) -> bool:
        """Whether there are answers from before and after training."""
        return all(pair.before and pair.after for group in self.groups for pair in group.pairs)


def answered(sets: Sequence[TestSet]) -> list[Answered]:
    """The test sets that have predictions."""
    return [
        Answered(tests, grouped, prompts.template([pair.shown.prompt for pair in pairs(tests)]))
        for tests in sets
        if (grouped := groups(tests))
    ]


def shown(group: Group) -> list[Pair]:
    """The rows of a group that the page shows."""
    return sample(group.pairs, _SHOWN.get((group.before, group.after), 0))
