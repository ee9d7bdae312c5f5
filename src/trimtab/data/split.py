"""Rows drawn from the training rows: a smaller set to train on, and validation rows split off. Same seed, same rows."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from trimtab.data.rows import Example
from trimtab.errors import DataError


def draw(examples: Sequence[Example], count: int, seed: int, choices: Sequence[str] | None) -> list[Example]:
    """``count`` of the rows (all, if there are no more), drawn by ``seed``, in their old order, mixed alike."""
    if count >= len(examples):
        return list(examples)
    drawn = _drawn(examples, count / len(examples), seed, choices)
    return [example for place, example in enumerate(examples) if place in drawn]


def split_off(
    examples: Sequence[Example], fraction: float, seed: int, choices: Sequence[str] | None
) -> tuple[list[Example], list[Example]]:
    """Training and validation rows: ``fraction`` of the rows, drawn by ``seed``, both in their old order, mixed alike.

    Raises DataError if a part would be empty.
    """
    held = _drawn(examples, fraction, seed, choices)
    training = [example for place, example in enumerate(examples) if place not in held]
    validation = [example for place, example in enumerate(examples) if place in held]
    if not training or not validation:
        raise DataError(
            f"data.validation: {fraction} of {len(examples)} rows leaves {len(training)} to train on and "
            f"{len(validation)} to "
            "validate on; give another fraction, a file, or null for no validation"
        )
    return training, validation


def _drawn(examples: Sequence[Example], fraction: float, seed: int, choices: Sequence[str] | None) -> set[int]:
    """Places of ``fraction`` of each group of rows.

    A group is a file, and within it an answer where the answers are a closed set. Fractions of rows are carried from
    group to group: all together are as many as were asked for.
    """
    groups: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        groups[example.source, example.answer if choices else None].append(place)
    chance = random.Random(seed)
    drawn: set[int] = set()
    seen = 0
    for key in sorted(groups, key=str):
        seen += len(groups[key])
        drawn.update(chance.sample(groups[key], min(len(groups[key]), round(seen * fraction) - len(drawn))))
    return drawn
