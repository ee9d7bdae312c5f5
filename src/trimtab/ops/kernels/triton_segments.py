"""The segments of a batch, each of which goes through an update of its own, as Triton's programs read them
(``triton_segment_programs``)."""

from __future__ import annotations

import math
import struct
from collections.abc import Container, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.ops.kernels import triton_segment_gradients as gradients, triton_segment_programs as programs
from trimtab.ops.kernels.triton import _full, call, padded, takes as takes
from trimtab.ops.stamp import address_of, is_fake

_PROGRAMS_ENOUGH = 256
_WALKED = 256
"""Rows of a segment that one program walks through in the backward pass: fewer would leave more to add up."""


class Segment(NamedTuple):
    """What some rows are multiplied with beside the weight."""

    size: int
    """How many rows."""
    thin: tuple[Tensor, Tensor, float] | None = None
    """``A [rank, in]``, ``B [out, rank]`` and ``s``."""
    square: tuple[Any, Tensor] | None = None
    """The square update, and its ``M [side, side]``."""
    ratio: Tensor | None = None
    bias: Tensor | None = None


class Segments:
    """Segments of a batch, ready to be added to its product: the tables that the programs read.

    Args:
        segments: those of all rows, in the order in which the rows are sorted.
        order: the row of each place among the sorted ones; None where they are sorted as they come.
        rows: the batch ``[tokens, in]``, or one like it.
        trains: there will be gradients (`TrainedSegments`).
    """

    def __init__(self, segments: Sequence[Segment], order: Tensor | None, rows: Tensor, trains: bool = False) -> None:
        self._order = order
        sizes = [segment.size for segment in segments]
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        thin = [(None, None, 0.0) if one.thin is None else one.thin for one in segments]
        self._a, self._b = _Held(a for a, _, _ in thin), _Held(b for _, b, _ in thin)
        self._ratio, self._bias = _Held(one.ratio for one in segments), _Held(one.bias for one in segments)
        self._rank = max(0 if a is None else len(a) for a, _, _ in thin)
        places, widths = [0] * len(segments), [0] * len(segments)
        self._squares: list[_Squares] = []
        self._spread = 0
        for update in dict.fromkeys(one.square[0] for one in segments if one.square is not None):
            mine = [number for number, one in enumerate(segments) if one.square is not None and one.square[0] == update]
            around, local = update.groups * update.side, 0
            for number in mine:
                widths[number], places[number] = around, self._spread + (local - starts[number]) * around
                local += sizes[number]
            parts = [slice(starts[number], starts[number] + sizes[number]) for number in mine]
            matrices = [segments[number].square[1] for number in mine]  # type: ignore[index]
            self._squares.append(_Squares(update, mine, parts, matrices, order=order, at=self._spread, rows=rows))
            self._spread += local * around
        columns: list[Iterable[int]] = [self._a.addresses, (0 if a is None else len(a) for a, _, _ in thin)]
        columns += [self._b.addresses, (_bits(scale) for _, _, scale in thin)]
        columns += [self._ratio.addresses, self._bias.addresses, places, widths]
        lines = [[*line] for line in zip(*columns, strict=True)]
        self._table = torch.tensor(lines, dtype=torch.int64, device=rows.device)
        self._tall = 16 if max(sizes) <= 16 else 32
        # In training every row gets an output of its own, also one that nothing is added to.
        changed = tuple(
            number for number, one in enumerate(segments) if trains or any(part is not None for part in one[1:])
        )
        self._tiles = tiles_of(tuple(sizes), changed, self._tall, rows)
        thin_ones = tuple(number for number in changed if segments[number].thin is not None)
        self._thin_tiles = self._tiles if thin_ones == changed else tiles_of(tuple(sizes), thin_ones, self._tall, rows)

    def add(self, product: Tensor, rows: Tensor) -> None:
        """``product = c (p + x dV^T) + bias`` in place, for ``rows = x [tokens, in]`` in the order in which they come,
        and ``product = p [tokens, out]``."""
        if not len(self._tiles):
            return
        self._add(product, None, rows.contiguous())

    def _add(self, product: Tensor, output: Tensor | None, rows: Tensor) -> Tensor | None:
        """``add``, with the result in ``output`` where there is one; and h, if there are thin updates."""
        inner = self._multiplied(rows) if self._rank else None
        spread = None
        if self._spread:
            spread = rows.new_empty(self._spread)
            for square in self._squares:
                square.multiply(rows, spread)
        lists = self._b.tensors, self._ratio.tensors, self._bias.tensors
        given = (product, output, inner, spread, self._order, self._table, self._tiles, *lists, self._tall, False)
        call(torch.ops.trimtab.add_segments, programs.add, given)
        return inner

    def _multiplied(self, rows: Tensor) -> Tensor:
        """``x A^T [splits, tokens, rank]`` in full digits, sorted: to be added up by whoever reads it."""
        (tokens, features), tiles = rows.shape, self._thin_tiles
        started = max(1, len(tiles) * math.ceil(self._rank / min(64, padded(self._rank))))
        splits = max(1, min(_PROGRAMS_ENOUGH // started, features // 512, 16))
        into = rows.new_empty(splits, tokens, self._rank, dtype=_full(rows.dtype))
        given = (into, rows, self._order, self._table, tiles, self._a.tensors, self._rank, self._tall, False)
        call(torch.ops.trimtab.multiply_segments, programs.multiply, given)
        return into


class TrainedSegments(Segments):
    """Segments with their gradients."""

    def __init__(self, segments: Sequence[Segment], order: Tensor | None, rows: Tensor) -> None:
        super().__init__(segments, order, rows, trains=True)
        self._ranks = [0 if one.thin is None else len(one.thin[0]) for one in segments]
        self._sizes = tuple(one.size for one in segments)
        turned = [
            [0, rank, address, _bits(1.0), 0, 0, 0, 0]
            for rank, address in zip(self._ranks, self._a.addresses, strict=True)
        ]
        self._turned = torch.tensor(turned, dtype=torch.int64, device=rows.device)

    def forward(self, product: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """``c (p + x dV^T) + bias`` for ``product = p``, in which ``p + x dV^T`` is left where there are ratios; and
        h."""
        output = torch.empty_like(product) if self._ratio.tensors else None
        inner = self._add(product, output, rows)
        return product if output is None else output, inner

    def backward(self, grad: Tensor, product: Tensor | None, inner: Tensor | None, wants_bias: bool) -> Gradients:
        """The pass over ``grad = dy [tokens, out]``, for what ``forward`` has left in ``product``."""
        out, width = grad.shape[1], self._rank
        tiles, spans = self._walked(grad)
        given = (
            grad,
            product,
            inner,
            self._order,
            self._table,
            tiles,
            self._b.tensors,
            self._ratio.tensors,
            wants_bias,
        )
        scaled, parts_inner, parts = call(torch.ops.trimtab.backward_segments, gradients.backward, given)
        sums = call(torch.ops.trimtab.add_up_segments, gradients.add_up, (parts, spans))
        of_b, of_product, of_bias = sums.split([out * width, out, out], 1)
        each = zip(of_b.unflatten(1, (out, width)) if width else of_b, self._ranks, strict=True)
        return Gradients(
            grad if product is None else scaled,
            parts_inner.sum(0) if width else None,
            [one[:, :rank] if rank else None for one, rank in each],
            of_product,
            of_bias,
        )

    def through_updates(
        self, found: Gradients, rows: Tensor, grad_rows: Tensor | None, wanted: Container[int]
    ) -> dict[int, Tensor]:
        """The gradients of A and of M of the segments ``wanted``, by number. What comes back through the updates is
        added to ``grad_rows [tokens, in]``."""
        gradients_of: dict[int, Tensor] = {}
        if found.inner is not None:
            if grad_rows is not None:
                self._add_input_gradient(grad_rows, found.inner)
            thin = [number for number, rank in enumerate(self._ranks) if rank]
            if any(number in wanted for number in thin):
                each = self._weight_gradients(found.inner, rows)
                gradients_of |= {number: each[number][: self._ranks[number]] for number in thin}
        for square in self._squares:
            collected = square.collected(found.scaled)
            if grad_rows is not None:
                square.add_input_gradient(grad_rows, collected)
            if any(number in wanted for number in square.numbers):
                gradients_of |= zip(square.numbers, square.weight_gradients(collected, rows), strict=True)
        return gradients_of

    def _add_input_gradient(self, target: Tensor, inner: Tensor) -> None:
        """Add ``h A`` to ``target [tokens, in]``."""
        lists: tuple[list[Tensor], ...] = self._a.tensors, [], []
        tiles = self._thin_tiles
        given = (target, None, inner.unsqueeze(0), None, self._order, self._turned, tiles, *lists, self._tall, True)
        call(torch.ops.trimtab.add_segments, programs.add, given)

    def _weight_gradients(self, inner: Tensor, rows: Tensor) -> Tensor:
        """``h^T x [segments, largest rank, in]``."""
        return outer(inner, rows, self._order, self._walked(rows))

    def _walked(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return walked(self._sizes, _WALKED, like)


class Gradients(NamedTuple):
    """What comes of a pass over ``dy``."""

    scaled: Tensor
    """``c dy``."""
    inner: Tensor | None
    """``s (c dy) B [tokens, rank]``, sorted, in full digits."""
    b: list[Tensor | None]
    """``s (c dy)^T h [out, rank]`` of each segment, and so on:"""
    products: Tensor
    """``sum dy p [segments, out]``"""
    bias: Tensor
    """``sum dy [segments, out]``"""


def _bits(number: float) -> int:
    """The bits of ``number``, to stand in a table of whole numbers."""
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


class _Squares:
    """The segments whose square updates are alike but for M; ``numbers`` says which."""

    def __init__(
        self,
        update: Any,
        numbers: Sequence[int],
        parts: list[slice],
        matrices: list[Tensor],
        *,
        order: Tensor | None,
        at: int,
        rows: Tensor,
    ) -> None:
        self.numbers = numbers
        self._update, self._at = update, at
        self._part, self._order = slice(parts[0].start, parts[-1].stop), None
        together = all(one.stop == other.start for one, other in pairwise(parts))
        if order is not None or not together:
            every = torch.arange(rows.shape[0], device=rows.device) if order is None else order
            self._order = every[self._part] if together else torch.cat([every[part] for part in parts])
        self._m = _Held(matrices)
        lines = [[address, update.side] + [0] * (programs.FIELDS - 2) for address in self._m.addresses]
        self._table = torch.tensor(lines, dtype=torch.int64, device=rows.device)
        self._sizes = tuple((part.stop - part.start) * update.groups for part in parts)
        self._tiles = tiles_of(self._sizes, tuple(range(len(parts))), 32, rows)

    def multiply(self, rows: Tensor, spread: Tensor) -> None:
        """Leave the product with M, not repeated yet, in its part of ``spread``."""
        gathered = self._update.gathered(self._mine(rows), self._order)
        self._multiplied(gathered, spread[self._at : self._at + gathered.numel()], turned=False)

    def collected(self, grad: Tensor) -> Tensor:
        """What comes back to the product with M, ``[tokens of these segments, groups, side]``."""
        found: Tensor = self._update.collected(self._mine(grad), self._order)
        return found

    def add_input_gradient(self, grad_rows: Tensor, collected: Tensor) -> None:
        inner = torch.empty_like(collected, memory_format=torch.contiguous_format)
        self._multiplied(collected, inner.flatten(), turned=True)
        self._update.add_expanded(self._mine(grad_rows), inner, self._order)

    def weight_gradients(self, collected: Tensor, rows: Tensor) -> Tensor:
        """``[segments, side, side]``."""
        gathered = self._update.gathered(self._mine(rows), self._order).flatten(0, 1)
        tiles = walked(self._sizes, _WALKED * self._update.groups, rows)
        return outer(collected.contiguous().flatten(0, 1), gathered, None, tiles)

    def _mine(self, rows: Tensor) -> Tensor:
        return rows if self._order is not None else rows[self._part]

    def _multiplied(self, gathered: Tensor, into: Tensor, turned: bool) -> None:
        side, flat = self._update.side, gathered.contiguous().flatten(0, 1)
        given = (into.view(1, -1, side), flat, None, self._table, self._tiles, self._m.tensors, side, 32, turned)
        call(torch.ops.trimtab.multiply_segments, programs.multiply, given)


class _Held:
    """Tensors that a table says the addresses of, all of one dtype and each in one piece; 0 where there is none."""

    def __init__(self, given: Iterable[Tensor | None]) -> None:
        every = [None if one is None else one.detach() for one in given]
        dtypes = {one.dtype for one in every if one is not None}
        if len(dtypes) > 1:
            widest = torch.float64 if torch.float64 in dtypes else torch.float32
            every = [None if one is None else one.to(widest) for one in every]
        every = [None if one is None else one.contiguous() for one in every]
        self.tensors = [one for one in every if one is not None]
        """They stay in memory as long as the table is used."""
        self.addresses = [0 if one is None else address_of(one) for one in every]


def tiles_of(sizes: tuple[int, ...], of: tuple[int, ...], tall: int, like: Tensor) -> Tensor:
    """``[tiles, 3]``: segment, first place and end of each tile of up to ``tall`` rows, for the segments ``of`` those
    that have so many rows. Kept for the next layers of the same batch."""
    made = _tiles_of.__wrapped__ if is_fake(like) else _tiles_of
    return made(sizes, of, tall, like.device)


def walked(sizes: tuple[int, ...], tall: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of many rows, each of which a program walks through; and which of them a segment has."""
    made = _spans_of.__wrapped__ if is_fake(like) else _spans_of
    return tiles_of(sizes, tuple(range(len(sizes))), tall, like), made(sizes, tall, like.device)


def outer(inner: Tensor, rows: Tensor, order: Tensor | None, tiles_and_spans: tuple[Tensor, Tensor]) -> Tensor:
    """``h^T x [segments, width, in]`` for ``inner = h [tokens, width]``, sorted; the tiles as ``walked`` gives them."""
    tiles, spans = tiles_and_spans
    parts = call(torch.ops.trimtab.outer_segments, gradients.outer, (inner, rows, order, tiles))
    sums: Tensor = call(torch.ops.trimtab.add_up_segments, gradients.add_up, (parts, spans))
    products: Tensor = sums.unflatten(1, (inner.shape[1], rows.shape[1]))
    return products


@lru_cache(maxsize=32)
def _tiles_of(sizes: tuple[int, ...], of: tuple[int, ...], tall: int, device: torch.device) -> Tensor:
    found = []
    for number in of:
        start, stop = sum(sizes[:number]), sum(sizes[: number + 1])
        found += [[number, first, stop] for first in range(start, stop, tall)]
    with torch.inference_mode(False):
        return torch.tensor(found, dtype=torch.int64, device=device).view(-1, 3)


@lru_cache(maxsize=32)
def _spans_of(sizes: tuple[int, ...], tall: int, device: torch.device) -> Tensor:
    ends = [sum(math.ceil(size / tall) for size in sizes[: number + 1]) for number in range(len(sizes))]
    with torch.inference_mode(False):
        return torch.tensor([*zip([0, *ends], ends, strict=False)], dtype=torch.int64, device=device)
