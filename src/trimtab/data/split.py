"""Validation rows split off the training rows, the same ones for the same seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from trimtab.data.rows import Example
from trimtab.errors import DataError


def split_off(
    examples: Sequence[Example], fraction: float, seed: int, choices: Sequence[str] | None
) -> tuple[list[Example], list[Example]]:
    """Training and validation rows: ``fraction`` of each group, drawn by ``seed``, both in their old order.

    A group is a file, and within it an answer where the answers are a closed set, so that the parts are mixed alike.
    Fractions of rows are carried from group to group: the parts have the size that was asked for.

    Raises DataError if a part would be empty.
    """
    groups: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        groups[example.source, example.answer if choices else None].append(place)
    chance = random.Random(seed)
    held: set[int] = set()
    seen = 0
    for key in sorted(groups, key=str):
        seen += len(groups[key])
        held.update(chance.sample(groups[key], min(len(groups[key]), round(seen * fraction) - len(held))))
    training = [example for place, example in enumerate(examples) if place not in held]
    validation = [example for place, example in enumerate(examples) if place in held]
    if not training or not validation:
        raise DataError(
            f"data.validation: {fraction} of {len(examples)} rows leaves {len(training)} to train on and "
            f"{len(validation)} to "
            "validate on; give another fraction, a file, or null for no validation"
        )
    return training, validation
