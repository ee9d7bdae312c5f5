"""Correlations of plain numbers."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None for fewer than three pairs, or where one side does not vary."""
    assert len(x) == len(y)
    try:
        return statistics.correlation(x, y) if len(x) >= 3 else None
    except statistics.StatisticsError:  # one side does not vary
        return None


def centred(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Each value less the mean of its group, so that only the variation within groups remains."""
    members: dict[Hashable, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    means = {group: statistics.fmean(inside) for group, inside in members.items()}
    return [value - means[group] for value, group in zip(values, groups, strict=True)]
