"""Rows of a test set before and after training: how many moved, which few are worth showing, and the template that
their prompts share. Shown whole, ten rows are ten copies of an instruction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.runs.read import TestSet
from trimtab.runs.results import Prediction

# A line in this share of the prompts belongs to the template. Low, as a template may come in a few variants; and only
# where there are enough prompts for a repetition to mean something.
_SHARE = 0.15
_ENOUGH = 5


@dataclass(frozen=True)
class Template:
    """The lines that prompts repeat, most frequent first, and what every remaining text begins and ends with."""

    lines: tuple[str, ...] = ()
    prefix: str = ""
    suffix: str = ""

    def own_words(self, prompt: str) -> str:
        """``prompt`` without the template; the whole prompt where nothing else would be left."""
        rest = _without(prompt, self.lines).removeprefix(self.prefix).removesuffix(self.suffix)
        return rest.strip() or prompt.strip()

    def __bool__(self) -> bool:
        return bool(self.lines or self.prefix or self.suffix)


def template(prompts: Sequence[str]) -> Template:
    """The template of ``prompts``; an empty one where they are few, have nothing in common or are all but the same."""
    if len(prompts) < _ENOUGH:
        return Template()
    seen = Counter(line for prompt in prompts for line in set(prompt.splitlines()) if line.strip())
    often = [line for line, times in seen.items() if times >= max(2, _SHARE * len(prompts))]
    # Among equals in the order of the alphabet, since a set has no order of its own.
    lines = tuple(sorted(often, key=lambda line: (-seen[line], line)))
    rests = [rest for prompt in prompts if (rest := _without(prompt, lines))]
    if 2 * len(rests) < len(prompts):
        return Template()
    if len(set(rests)) == 1:
        return Template(lines)
    # Up to a mark that ends a label ("Input:", "[INST]"): questions that all begin with "What is" keep those words.
    label = re.match(r".*[:>|\]}]\s*", _common_start(rests), re.DOTALL)
    prefix = label[0] if label else ""
    end = _common_start([rest[len(prefix) :][::-1] for rest in rests])[::-1]
    label = re.search(r"[<\[{|].*|^.*:\s*$", end, re.DOTALL)
    return Template(lines, prefix, label[0] if label else "")


def _without(prompt: str, lines: Sequence[str]) -> str:
    return "\n".join(line for line in prompt.splitlines() if line not in lines).strip()


def _common_start(texts: Sequence[str]) -> str:
    """What all ``texts`` begin with, in whole words."""
    # The first and the last in order differ soonest.
    first, last = min(texts), max(texts)
    differ = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return re.sub(r"\w+$", "", first[: next(differ, min(len(first), len(last)))])


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


def _spread(rows: list[Pair], count: int) -> list[Pair]:
    count = min(count, len(rows))
    return [rows[(2 * place + 1) * len(rows) // (2 * count)] for place in range(count)]


@dataclass(frozen=True)
class Answered:
    """The answers on one test set: all groups with their rows, and the template that the prompts share."""

    tests: TestSet
    groups: list[Group]
    template: Template

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

    def mixed(self, count: int) -> list[Pair]:
        """``count`` rows over all groups, most of them rows that changed: for a reader who sees these alone."""
        # Taken in turn, so that one group with few rows leaves its places to the others.
        queues = [list(sample(group.pairs, count)) for group in self.groups]
        weights = [2 if group.before is False and group.after is True else 1 for group in self.groups]
        chosen: list[Pair] = []
        while len(chosen) < count and any(queues):
            for queue, weight in zip(queues, weights, strict=True):
                chosen += queue[:weight]
                del queue[:weight]
        return chosen[:count]


def answered(sets: Sequence[TestSet], *, pictures: bool = False) -> list[Answered]:
    """The test sets that have predictions. The prompts of ``pictures`` are their paths, which have no template."""
    return [
        Answered(tests, grouped, template([] if pictures else [pair.shown.prompt for pair in pairs(tests)]))
        for tests in sets
        if (grouped := groups(tests))
    ]


def shown(group: Group) -> list[Pair]:
    """The rows of a group that the page shows."""
    return sample(group.pairs, _SHOWN.get((group.before, group.after), 0))
