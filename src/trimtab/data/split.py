"""Draws a smaller set of rows to train on, and splits off validation rows. The same seed draws the same rows."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from trimtab.data.rows import Example
from trimtab.errors import DataError


def draw(examples: Sequence[Example], count: int, seed: int, choices: Sequence[str] | None) -> list[Example]:
    """``count`` of the rows, or all if there are no more, in their order; files and choices keep their shares."""
    if count >= len(examples):
        return list(examples)
    return _partition(examples, count / len(examples), seed, choices)[0]


def split_off(
    examples: Sequence[Example], fraction: float, seed: int, choices: Sequence[str] | None
) -> tuple[list[Example], list[Example]]:
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


def _partition(
    examples: Sequence[Example], fraction: float, seed: int, choices: Sequence[str] | None
) -> tuple[list[Example], list[Example]]:
    """``fraction`` of the rows drawn at random from each group, and the remaining rows, both in their order.

    A group is one file and, where there are ``choices``, one answer in it. What rounding leaves over in one group is
    carried to the next, so that the total is what was asked for.
    """
    groups: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.source, example.answer if choices else None].append(index)
    chance = random.Random(seed)
    drawn: set[int] = set()
    seen = 0
    for key in sorted(groups, key=str):
        seen += len(groups[key])
        drawn.update(chance.sample(groups[key], min(len(groups[key]), round(seen * fraction) - len(drawn))))
    rest = [example for index, example in enumerate(examples) if index not in drawn]
    return [example for index, example in enumerate(examples) if index in drawn], rest
