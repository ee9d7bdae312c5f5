"""How large rows and batches are, as far as memory goes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

One = TypeVar("One")

LOOKED_AT = 64
"""Of rows that are evaluated, so many are read for how long the longest is: those with the most characters."""


@dataclass(frozen=True)
class Batch:
    """The size of a batch: ``rows`` of ``length`` tokens. ``labels`` of all its positions carry loss.

    ``shape``: of a picture, ``[channels, height, width]``, where rows are pictures. ``packed``: whether the rows lie
    one behind the other.
    """

    rows: int
    length: int
    labels: int
    shape: tuple[int, ...] = ()
    packed: bool = False


@dataclass(frozen=True)
class RowSizes:
    """All that a run's rows mean for its memory.

    Attributes:
        length: tokens of the longest row.
        labels: positions of a long row that carry loss.
        evaluated: whether there are validation or test rows.
        generates: whether their answers are generated.
        shape: of a picture, as in `Batch`.
        tested: tokens of the longest validation or test row, with what is written to it; 0: as many as ``length``.
        tested_labels: positions of such a row that carry loss; 0: as many as ``labels``.
    """

    length: int
    labels: int
    evaluated: bool = False
    generates: bool = False
    shape: tuple[int, ...] = ()
    tested: int = 0
    tested_labels: int = 0


def with_most_characters(rows: Sequence[One], characters: Callable[[One], int]) -> list[One]:
    """The few of ``rows`` among which the one of most tokens is looked for."""
    return heapq.nlargest(LOOKED_AT, rows, key=characters)
