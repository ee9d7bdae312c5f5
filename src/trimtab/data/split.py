"""Draws a smaller set of rows to train on, splits off validation rows, and counts weights. The same seed draws the same
rows."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from trimtab.data.rows import Answered, OneAnswered
from trimtab.errors import DataError


def draw(examples: Sequence[OneAnswered], count: int, seed: int, choices: Sequence[str] | None) -> list[OneAnswered]:
    """``count`` of the rows, or all if there are no more, in their order; files and choices keep their shares."""
    if count >= len(examples):
        return list(examples)
    return _partition(examples, count / len(examples), seed, choices)[0]


def split_off(
    examples: Sequence[OneAnswered], fraction: float, seed: int, choices: Sequence[str] | None
) -> tuple[list[OneAnswered], list[OneAnswered]]:
    """Training rows, and ``fraction`` of the rows for validation; in both, files and choices keep their shares.

    Raises DataError if either would be empty.
    """
    validation, training = _partition(examples, fraction, seed, choices)
    if not training or not validation:
        raise DataError(
            f"data.validation: {fraction} of {len(examples)} rows leaves {len(training)} to train on and "
            f"{len(validation)} to validate on; give another fraction, a file, or null for no validation"
        )
    return training, validation


def times_an_epoch(examples: Sequence[Answered], seed: int, choices: Sequence[str] | None) -> list[int]:
    """How often each row comes in an epoch, by the weight of its source.

    The whole part of a weight is how often every row comes. Of the rest, such as 0.3, three tenths of the rows come
    once more: drawn once, the same in every epoch, and evenly over files and choices.
    """
    times = [0] * len(examples)
    by_weight: dict[float, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_weight[example.entry.weight if example.entry is not None else 1.0].append(index)
    for weight, indices in by_weight.items():
        whole, part = divmod(weight, 1)
        again = _drawn([examples[index] for index in indices], part, seed, choices) if part else set()
        for place, index in enumerate(indices):
            times[index] = int(whole) + (place in again)
    return times


def _partition(
    examples: Sequence[OneAnswered], fraction: float, seed: int, choices: Sequence[str] | None
) -> tuple[list[OneAnswered], list[OneAnswered]]:
    """``fraction`` of the rows drawn at random, and the remaining rows, both in their order."""
    drawn = _drawn(examples, fraction, seed, choices)
    rest = [example for index, example in enumerate(examples) if index not in drawn]
    return [example for index, example in enumerate(examples) if index in drawn], rest


def _drawn(examples: Sequence[Answered], fraction: float, seed: int, choices: Sequence[str] | None) -> set[int]:
    """The places of ``fraction`` of the rows, drawn at random from each group.

    A group is one file and, where there are ``choices``, one answer in it; answers of several of them (labels, tags)
    are one group. What rounding leaves over in one group is carried to the next, so that the total is what was asked
    for.
    """
    known = set(choices or ())
    groups: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.source, example.answer if example.answer in known else None].append(index)
    chance = random.Random(seed)
    drawn: set[int] = set()
    seen = 0
    for key in sorted(groups, key=str):
        seen += len(groups[key])
        drawn.update(chance.sample(groups[key], min(len(groups[key]), round(seen * fraction) - len(drawn))))
    return drawn
