"""How large rows and batches are, as far as memory goes."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    length: int
    labels: int
    evaluated: bool = False
    generates: bool = False
    shape: tuple[int, ...] = ()
