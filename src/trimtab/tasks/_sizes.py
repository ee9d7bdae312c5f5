"""How large rows and batches are, as far as memory goes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """The size of a batch: ``rows`` of ``length`` tokens. ``labels`` of all its positions carry loss."""

    rows: int
    length: int
    labels: int


@dataclass(frozen=True)
class RowSizes:
    """All that a run's rows mean for its memory.

    Attributes:
        length: tokens of the longest row.
        labels: positions of a long row that carry loss.
        evaluated: whether there are validation or test rows.
        generates: whether their answers are generated.
    """

    length: int
    labels: int
    evaluated: bool = False
    generates: bool = False
