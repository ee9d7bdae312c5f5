"""A cache of keys and values for rows that come and go.

All rows end in the same column, so that a step writes one column, and the distances between columns are those between
positions. A row that has fewer tokens than the longest begins later; before it stand zeros, which its mask hides:

    slot 0   . . . a a a a|        a column more at each step; a newcomer is copied in behind the same column,
    slot 1   b b b b b b b|        and the last row moves into the slot of one that leaves
    slot 2   . . . . . c c|

The columns lie in a buffer with room at its end, so a step copies nothing of what is there (``DynamicCache`` copies all
of it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 64  # columns to begin with; a buffer that is full doubles


class RowLayer(DynamicLayer):
    """What one layer of the model keeps: ``keys`` and ``values`` are buffers [slots, heads, room, size], of which
    ``rows`` slots and the columns from ``start`` to ``stop`` are in use."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = self.start = self.stop = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write columns [rows, heads, columns, size] behind the last one, and give all that there are."""
        count = key_states.shape[-2]
        assert self.keys is not None
        assert self.values is not None
        if self.stop + count > self.keys.shape[-2]:
            self._remake(self.keys.shape[0], self.stop - self.start, max(_ROOM, self.stop - self.start))
        self.keys[: self.rows, :, self.stop : self.stop + count] = key_states
        self.values[: self.rows, :, self.stop : self.stop + count] = value_states
        self.stop += count
        inside = slice(self.start, self.stop)
        return self.keys[: self.rows, :, inside], self.values[: self.rows, :, inside]

    def get_seq_length(self) -> int:
        return self.stop - self.start

    def join(self, keys: Tensor, values: Tensor) -> None:
        """Take in rows [rows, heads, columns, size] behind those that are there."""
        count, width = keys.shape[0], max(keys.shape[-2], self.stop - self.start)
        if self.keys is None:
            self.keys = keys.new_zeros(max(count, 4), keys.shape[1], width + _ROOM, keys.shape[-1])
            self.values = values.new_zeros(max(count, 4), values.shape[1], width + _ROOM, values.shape[-1])
            self.start = self.stop = width
            self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        slots = self.keys.shape[0]
        if self.rows + count > slots or width > self.stop:
            self._remake(max(self.rows + count, slots), width, max(_ROOM, width))
        assert self.keys is not None
        assert self.values is not None
        new = slice(self.rows, self.rows + count)
        for buffer, states in ((self.keys, keys), (self.values, values)):
            # What stood in these places before must not be seen again: hidden or not, a NaN in it would spread.
            buffer[: self.rows, :, self.stop - width : self.start] = 0
            buffer[new, :, self.stop - width : self.stop] = 0
            buffer[new, :, self.stop - states.shape[-2] : self.stop] = states
        self.rows += count
        self.start = self.stop - width

    def leave(self, slot: int, width: int) -> None:
        """Let the last row take the place of the one in ``slot``; the longest that is left has ``width`` columns."""
        self.rows -= 1
        if self.keys is None or self.values is None:
            return
        inside = slice(self.start, self.stop)
        if slot != self.rows:
            self.keys[slot, :, inside] = self.keys[self.rows, :, inside]
            self.values[slot, :, inside] = self.values[self.rows, :, inside]
        self.start = self.stop - width

    def _remake(self, slots: int, width: int, room: int) -> None:
        """Move to buffers in which ``width`` columns end before ``room`` free ones."""
        assert self.keys is not None
        assert self.values is not None
        own = self.stop - self.start
        moved = []
        for buffer in (self.keys, self.values):
            new = buffer.new_zeros(slots, buffer.shape[1], width + room, buffer.shape[-1])
            new[: self.rows, :, width - own : width] = buffer[: self.rows, :, self.start : self.stop]
            moved.append(new)
        self.keys, self.values = moved
        self.start, self.stop = width - own, width


class RowCache(Cache):
    """The layers' caches, and how many tokens each row has in them.

    Args:
        layers: how many layers the model's own cache has.
    """

    def __init__(self, layers: int) -> None:
        self.rows = [RowLayer() for _ in range(layers)]
        self.lengths: list[int] = []
        super().__init__(layers=[*self.rows])

    def join(self, other: Cache, lengths: list[int]) -> None:
        """Take in the rows of another cache, of which each has its ``lengths`` of columns at the end."""
        for mine, theirs in zip(self.rows, other.layers, strict=True):
            if isinstance(theirs, DynamicLayer) and theirs.keys is not None and theirs.values is not None:
                mine.join(theirs.keys, theirs.values)  # (a layer may read what another one keeps, and keep nothing)
        self.lengths += lengths

    def leave(self, slot: int) -> None:
        """Let a row go; the last one takes its slot."""
        self.lengths[slot] = self.lengths[-1]
        self.lengths.pop()
        for layer in self.rows:
            layer.leave(slot, max(self.lengths, default=0))

    def inputs(self, tokens: list[int], device: torch.device) -> dict[str, Tensor]:
        """The arguments of the model for one more token of each row, which is counted in from now on."""
        self.lengths = [length + 1 for length in self.lengths]
        lengths = torch.tensor(self.lengths, device=device)
        width = int(max(self.lengths))
        mask = torch.arange(width, 0, -1, device=device) <= lengths[:, None]
        return {
            "input_ids": torch.tensor(tokens, device=device)[:, None],
            "attention_mask": mask.long(),
            "position_ids": lengths[:, None] - 1,
        }
