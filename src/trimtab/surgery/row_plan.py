"""Which rows of a batch go through which adapter, and which entries of a tensor belong to a row."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import SurgeryError
from trimtab.ops.mixed_rows import Order

_NOBODY: Any = object()
_DEALT = 4  # sets of rows whose decisions are kept
# The arguments of a model by whose first axis its rows are counted, before any other.
_BATCHES = (
    *("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_values"),
    *("input_features", "x", "input"),
)


class Group:
    """The rows that go through one adapter (None: through none) on some module."""

    def __init__(self, name: str | None, rows: list[int]) -> None:
        self.name, self.rows = name, rows


class RowPlan:
    """The adapter of each row. A row may be several rows of a tensor that follow each other: beams of one prompt, or
    the tokens of a text where a module gets all tokens in one row of vectors."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.expands = False
        """Whether the rows may have become several each: inside ``generate``."""
        self._batch = len(self.names)
        self._lengths: set[int] = set()
        self._only: Any = _NOBODY
        self._groups: dict[tuple[str, ...], list[Group]] = {}
        self._orders: dict[Any, tuple[list[slice], Order | None]] = {}
        self.decided: dict[int, Any] = {}
        """What a module, by its id, does with a batch of the size that it had last."""
        self._dealt = {self.names: (self._groups, self._orders, self.decided)}

    def deal(self, names: Sequence[str | None]) -> None:
        """From now on the batches have these rows. All names have to be among those that ``per_row`` was entered with,
        which has looked whether the model can tell rows of such adapters apart; what is decided for some rows is kept
        for when they come again."""
        self.names, self._lengths = tuple(names), set()
        self._batch = len(self.names)
        if self.names not in self._dealt and len(self._dealt) >= _DEALT:
            self._dealt.pop(next(iter(self._dealt)))
        self._groups, self._orders, self.decided = self._dealt.pop(self.names, ({}, {}, {}))
        self._dealt[self.names] = self._groups, self._orders, self.decided

    @property
    def only(self) -> str | None:
        """The adapter that all rows at hand go through, while they are apart (``apart``)."""
        return self._only  # type: ignore[no-any-return]

    @property
    def batch(self) -> int:
        """How many rows the model was called with."""
        return self._batch

    @property
    def is_apart(self) -> bool:
        return self._only is not _NOBODY

    @contextmanager
    def apart(self, name: str | None) -> Iterator[None]:
        """A context in which modules are called with rows of the adapter ``name`` alone."""
        before, self._only = self._only, name
        try:
            yield
        finally:
            self._only = before

    def groups(self, having: Collection[str]) -> list[Group]:
        """The rows by adapter, on a module that has only those adapters that are in ``having``."""
        if self.is_apart:
            return [Group(self.only if self.only in having else None, [])]
        key = tuple(having)
        if key not in self._groups:
            found: dict[str | None, list[int]] = {}
            for row, name in enumerate(self.names):
                found.setdefault(name if name in key else None, []).append(row)
            self._groups[key] = [Group(name, rows) for name, rows in found.items()]
        return self._groups[key]

    def begin(self, args: Sequence[Any], kwargs: Any) -> None:
        """Note how many rows the model is called with. Raises SurgeryError if they are others than there are names."""
        named = [kwargs[name] for name in _BATCHES if isinstance(kwargs.get(name), Tensor)]
        every = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dim()]
        batch = next(iter([one for one in args if isinstance(one, Tensor) and one.dim()] + named + every), None)
        if batch is None or self.is_apart:
            return
        rows, count = batch.shape[0], len(self.names)
        if rows != count and not (self.expands and rows % count == 0):
            raise SurgeryError(
                f"per_row: the batch has {rows} rows (its first axis, {list(batch.shape)}), and {count} adapters were "
                "named, one for each row. Give as many names as rows; None stands for the bare model"
            )
        self._batch = rows
        self._lengths = {one.shape[1] for one in every if one.dim() > 1 and one.shape[0] == rows}

    def end(self) -> None:
        """Forget how many rows the last call had."""
        self._batch, self._lengths = len(self.names), set()

    def entries(self, x: Tensor, what: str, of_vectors: bool = True) -> int:
        """How many entries of the first axis of ``x``, the input of ``what``, belong to a name, one after the other; 0
        where it has one entry that all rows share. Raises SurgeryError where that cannot be told.

        ``of_vectors``: whether an axis of features, or of what stands for them, comes last.
        """
        size, count = x.shape[0] if x.dim() else 0, len(self.names)
        if x.dim() > (1 if of_vectors else 0):
            if size == self._batch or (self.expands and x.dim() > 2 and size and size % count == 0):
                return size // count
            flat = x.dim() == (2 if of_vectors else 1)
            if flat and size in {self._batch * length for length in self._lengths}:
                return size // count
            if size == 1:
                return 0
        raise SurgeryError(
            f"per_row: {what} is called with a tensor {list(x.shape)} for a batch of {self._batch} rows, and it cannot "
            "be told which of it belongs to which row. Leave this module out of the adapters, or give all rows of a "
            "batch one adapter (trimtab.set_adapter)"
        )

    def order(self, groups: Sequence[Group], entries: int, device: torch.device) -> tuple[list[slice], Order | None]:
        """The entries of each group, in an order in which they lie together; None where they lie so as they come."""
        key = (tuple(tuple(group.rows) for group in groups), entries, device)
        if key not in self._orders:
            order = [row * entries + place for group in groups for row in group.rows for place in range(entries)]
            slices, start = [], 0
            for group in groups:
                slices.append(slice(start, start + len(group.rows) * entries))
                start = slices[-1].stop
            there = torch.tensor(order, device=device)
            as_they_come = order == list(range(len(order)))
            self._orders[key] = slices, None if as_they_come else Order(there, there.argsort())
        return self._orders[key]
