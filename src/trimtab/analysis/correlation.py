"""Correlations of plain numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None for fewer than three pairs, or where one side does not vary."""
    if len(x) < 3 or min(x) == max(x) or min(y) == max(y):
        return None
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    across = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    square_x, square_y = math.fsum((a - mean_x) ** 2 for a in x), math.fsum((b - mean_y) ** 2 for b in y)
    return across / math.sqrt(square_x * square_y) if square_x * square_y > 0 else None


def centred(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Each value less the mean of its group: what remains varies within groups alone."""
    members: dict[Hashable, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    means = {group: math.fsum(found) / len(found) for group, found in members.items()}
    return [value - means[group] for value, group in zip(values, groups, strict=True)]
