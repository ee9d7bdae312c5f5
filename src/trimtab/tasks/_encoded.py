"""Rows as tensors, for tasks whose rows are not kept end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import Any

from torch.utils.data import Dataset

from trimtab.data.rows import Answered

Tensors = dict[str, Any]
"""A row as the model takes it: ``input_ids`` or ``pixel_values`` and more, ``labels``, and the ``weight`` of a row."""


def token_ids(rows: Iterable[Tensors]) -> set[int]:
    """All tokens that stand in ``rows``; none where these are no texts."""
    return {token for row in rows for token in row.get("input_ids", ())}


class EncodedTensors(Dataset[Tensors]):
    """A map-style dataset of rows as tensors.

    Attributes:
        lengths: tokens of each row.
        origins: ``(source, number)`` of each row.
        cut: how many rows were shortened.
        dropped: ``(source, number, reason)`` of each row that was left out; here none is.
    """

    def __init__(self, rows: Sequence[Tensors], examples: Sequence[Answered], cut: int, length: Callable[..., int]):
        self._rows = list(rows)
        self.lengths = [length(row) for row in rows]
        self.origins = [(example.source, example.number) for example in examples]
        self.cut = cut
        self.dropped: list[tuple[str, int, str]] = []

    def repeated(self, times: Sequence[int]) -> EncodedTensors:
        """The rows as they come in an epoch: ``times[i]`` is how often the i-th does."""
        if all(count == 1 for count in times):
            return self
        repeated = copy(self)
        order = [row for row, count in enumerate(times) for _ in range(count)]
        repeated._rows = [self._rows[row] for row in order]
        repeated.lengths = [self.lengths[row] for row in order]
        repeated.origins = [self.origins[row] for row in order]
        return repeated

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensors:
        return self._rows[index]

    def __iter__(self) -> Iterator[Tensors]:
        return iter(self._rows)
