"""A batch whose rows belong to different updates, as Triton's programs: each update has a segment of the rows, and one
launch goes through all segments.

    multiply_segments    ``x F^T`` for the rows of each segment, F its own: A of a thin update, M of a square one
    add_segments         ``c (p + s h B^T + u) + bias`` in place of p, each segment with its own c, s, B and bias

What a segment has is a line of a table on the device, in which tensors are addresses: so nothing is copied together,
whatever the ranks and however many the adapters. A tile is some rows of one segment, and a program takes one tile; rows
are found by ``order``, so that neither the batch nor the product is sorted in memory.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.ops.kernels.triton import _NAMES, _dots, _full, _precision, accumulates, call, on_its_device, padded
from trimtab.ops.kernels.triton import takes as takes
from trimtab.ops.stamp import is_fake

_COLUMNS, _PROGRAMS_ENOUGH = 128, 256
_FIELDS = (
    8  # of a segment's line: address of F, its rows, address of B, s, addresses of c and of the bias, place, width
)


@triton.jit
def _tile(tiles, order, BM: tl.constexpr, ORDERED: tl.constexpr):
    """The segment of this tile; the places of its rows among those that are sorted, which of them there are, and the
    rows."""
    tile = tiles + 3 * tl.program_id(0)
    places = tl.load(tile + 1) + tl.arange(0, BM)
    in_rows = places < tl.load(tile + 2)
    rows = places
    if ORDERED:
        rows = tl.load(order + places, mask=in_rows, other=0)
    return tl.load(tile), places, in_rows, rows


@triton.jit(do_not_specialize=["tokens", "per_split"])
def multiply_segments(
    x,
    into,
    order,
    table,
    tiles,
    tokens,
    features,
    width,
    per_split,
    ORDERED: tl.constexpr,
    TYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FIELDS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x F^T`` over ``per_split`` of the features, in ``into [splits, tokens, width]``, sorted by segments."""
    segment, places, in_rows, rows = _tile(tiles, order, BM, ORDERED)
    count = tl.load(table + segment * FIELDS + 1)
    split, first = tl.program_id(1), tl.program_id(2) * BN
    if first < count:
        factor = tl.load(table + segment * FIELDS).to(tl.pointer_type(TYPE))
        columns = first + tl.arange(0, BN)
        in_columns = columns < count
        total = tl.zeros([BM, BN], ACC)
        from_rows = x + rows.to(tl.int64)[:, None] * features
        from_columns = factor + columns.to(tl.int64)[None, :] * features
        for start in range(split * per_split, tl.minimum((split + 1) * per_split, features), BK):
            inner = start + tl.arange(0, BK)
            in_inner = inner < features
            values = tl.load(from_rows + inner[None, :], mask=in_rows[:, None] & in_inner[None, :], other=0.0)
            others = tl.load(from_columns + inner[:, None], mask=in_inner[:, None] & in_columns[None, :], other=0.0)
            total += tl.dot(values.to(DOT), others.to(DOT), input_precision=PRECISION, out_dtype=ACC)
        place = (split.to(tl.int64) * tokens + places)[:, None] * width + columns[None, :]
        tl.store(into + place, total.to(into.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["tokens", "splits"])
def add_segments(
    product,
    inner,
    spread,
    order,
    table,
    tiles,
    tokens,
    out,
    width,
    splits,
    ORDERED: tl.constexpr,
    THIN: tl.constexpr,
    SQUARE: tl.constexpr,
    RATIO: tl.constexpr,
    BIAS: tl.constexpr,
    B_TYPE: tl.constexpr,
    RATIO_TYPE: tl.constexpr,
    BIAS_TYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    FIELDS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``product = c (p + s h B^T + u) + bias``; ``h`` is the sum of ``inner [splits, tokens, width]``, ``u`` what a
    square update has in ``spread``, repeated until a row is full."""
    segment, places, in_rows, rows = _tile(tiles, order, BM, ORDERED)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    in_columns = columns < out
    mask = in_rows[:, None] & in_columns[None, :]
    target = product + rows.to(tl.int64)[:, None] * out + columns[None, :]
    total = tl.load(target, mask=mask, other=0.0).to(ACC)
    line = table + segment * FIELDS
    if THIN:
        rank, b = tl.load(line + 1), tl.load(line + 2).to(tl.pointer_type(B_TYPE))
        scale = tl.load(line + 3).to(tl.float64, bitcast=True).to(ACC)
        for first in range(0, rank, BR):
            ranks = first + tl.arange(0, BR)
            in_ranks = ranks < rank
            in_inner = in_rows[:, None] & in_ranks[None, :]
            h = tl.zeros([BM, BR], ACC)
            for split in range(splits):
                from_inner = inner + (split * tokens + places).to(tl.int64)[:, None] * width
                h += tl.load(from_inner + ranks[None, :], mask=in_inner, other=0.0)
            factor = tl.load(
                b + columns.to(tl.int64)[None, :] * rank + ranks[:, None],
                mask=in_columns[None, :] & in_ranks[:, None],
                other=0.0,
            )
            total += tl.dot((h * scale).to(DOT), factor.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    if SQUARE:
        around = tl.load(line + 7)
        from_spread = spread + tl.load(line + 6) + places.to(tl.int64)[:, None] * around
        total += tl.load(from_spread + (columns % tl.maximum(around, 1))[None, :], mask=mask & (around > 0), other=0.0)
    if RATIO:
        c = tl.load(line + 4)
        total *= tl.load(c.to(tl.pointer_type(RATIO_TYPE)) + columns, mask=in_columns & (c != 0), other=1.0).to(ACC)
    if BIAS:
        bias = tl.load(line + 5)
        total += tl.load(bias.to(tl.pointer_type(BIAS_TYPE)) + columns, mask=in_columns & (bias != 0), other=0.0).to(
            ACC
        )
    tl.store(target, total.to(product.dtype.element_ty), mask=mask)


# How they are started -------------------------------------------------------------------------------------------------


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
    """

    def __init__(self, segments: Sequence[Segment], order: Tensor | None, rows: Tensor) -> None:
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
            self._squares.append(_Squares(update, parts, matrices, order=order, at=self._spread, rows=rows))
            self._spread += local * around
        lines = zip(
            self._a.addresses,
            (0 if a is None else len(a) for a, _, _ in thin),
            self._b.addresses,
            (struct.unpack("q", struct.pack("d", scale))[0] for _, _, scale in thin),
            self._ratio.addresses,
            self._bias.addresses,
            places,
            widths,
            strict=True,
        )
        self._table = torch.tensor([[*line] for line in lines], dtype=torch.int64, device=rows.device)
        self._tall = 16 if max(sizes) <= 16 else 32
        changed = tuple(number for number, one in enumerate(segments) if any(part is not None for part in one[1:]))
        self._tiles = tiles_of(tuple(sizes), changed, self._tall, rows)
        thin_ones = tuple(number for number in changed if segments[number].thin is not None)
        self._thin_tiles = self._tiles if thin_ones == changed else tiles_of(tuple(sizes), thin_ones, self._tall, rows)

    def add(self, product: Tensor, rows: Tensor) -> None:
        """``product = c (p + x dV^T) + bias`` in place, for ``rows = x [tokens, in]`` in the order in which they come,
        and ``product = p [tokens, out]``."""
        if not len(self._tiles):
            return
        rows = rows.contiguous()
        inner = spread = None
        if self._rank:
            inner = _multiplied(rows, self._order, self._table, self._thin_tiles, self._a, self._rank, self._tall)
        if self._spread:
            spread = rows.new_empty(self._spread)
            for square in self._squares:
                square.multiply(rows, spread)
        lists = self._b.tensors, self._ratio.tensors, self._bias.tensors
        given = (product, inner, spread, self._order, self._table, self._tiles, *lists, self._tall)
        call(torch.ops.trimtab.add_segments, _add, given)


class _Squares:
    """The segments whose square updates are alike but for M."""

    def __init__(
        self, update: Any, parts: list[slice], matrices: list[Tensor], *, order: Tensor | None, at: int, rows: Tensor
    ) -> None:
        self._update, self._at = update, at
        self._part, self._order = slice(parts[0].start, parts[-1].stop), None
        together = all(one.stop == other.start for one, other in pairwise(parts))
        if order is not None or not together:
            every = torch.arange(rows.shape[0], device=rows.device) if order is None else order
            self._order = every[self._part] if together else torch.cat([every[part] for part in parts])
        self._m = _Held(matrices)
        lines = [[address, update.side] + [0] * (_FIELDS - 2) for address in self._m.addresses]
        self._table = torch.tensor(lines, dtype=torch.int64, device=rows.device)
        sizes = tuple((part.stop - part.start) * update.groups for part in parts)
        self._tiles = tiles_of(sizes, tuple(range(len(parts))), 32, rows)

    def multiply(self, rows: Tensor, spread: Tensor) -> None:
        """Leave the product with M, not repeated yet, in its part of ``spread``."""
        update = self._update
        mine = rows if self._order is not None else rows[self._part]
        gathered = update.gathered(mine, self._order).flatten(0, 1)
        into = spread[self._at : self._at + gathered.numel()].view(1, -1, update.side)
        given = (into, gathered, None, self._table, self._tiles, self._m.tensors, update.side, 32)
        call(torch.ops.trimtab.multiply_segments, _multiply, given)


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
        self.addresses = [0 if one is None or is_fake(one) else one.data_ptr() for one in every]


def tiles_of(sizes: tuple[int, ...], of: tuple[int, ...], tall: int, like: Tensor) -> Tensor:
    """``[tiles, 3]``: segment, first place and end of each tile of up to ``tall`` rows, for the segments ``of`` those
    that have so many rows. Kept for the next layers of the same batch."""
    made = _tiles_of.__wrapped__ if is_fake(like) else _tiles_of
    return made(sizes, of, tall, like.device)


@lru_cache(maxsize=32)
def _tiles_of(sizes: tuple[int, ...], of: tuple[int, ...], tall: int, device: torch.device) -> Tensor:
    found = []
    for number in of:
        start, stop = sum(sizes[:number]), sum(sizes[: number + 1])
        found += [[number, first, stop] for first in range(start, stop, tall)]
    with torch.inference_mode(False):
        return torch.tensor(found, dtype=torch.int64, device=device).view(-1, 3)


def _multiplied(
    rows: Tensor, order: Tensor | None, table: Tensor, tiles: Tensor, a: _Held, rank: int, tall: int
) -> Tensor:
    """``x A^T [splits, tokens, rank]`` in full digits, sorted: to be added up by whoever reads it."""
    tokens, features = rows.shape
    programs = max(1, len(tiles) * math.ceil(rank / min(64, padded(rank))))
    splits = max(1, min(_PROGRAMS_ENOUGH // programs, features // (4 * _COLUMNS), 16))
    into = rows.new_empty(splits, tokens, rank, dtype=_full(rows.dtype))
    call(torch.ops.trimtab.multiply_segments, _multiply, (into, rows, order, table, tiles, a.tensors, rank, tall))
    return into


@on_its_device
def _multiply(
    into: Tensor,
    rows: Tensor,
    order: Tensor | None,
    table: Tensor,
    tiles: Tensor,
    factors: list[Tensor],
    most: int,
    tall: int,
) -> None:
    """``most``: the rows of the largest factor."""
    (splits, tokens, width), features = into.shape, rows.shape[1]
    wide = min(64, padded(most))
    deep = 64 if wide == 16 else 32
    multiply_segments[(len(tiles), splits, math.ceil(most / wide))](
        x=rows,
        into=into,
        order=tiles if order is None else order,
        table=table,
        tiles=tiles,
        tokens=tokens,
        features=features,
        width=width,
        per_split=math.ceil(features / splits / deep) * deep,
        ORDERED=order is not None,
        TYPE=_type(factors),
        BM=tall,
        BN=wide,
        BK=deep,
        FIELDS=_FIELDS,
        DOT=_dots(rows.dtype),
        ACC=accumulates(rows.dtype),
        PRECISION=_precision(),
        num_warps=4,
    )


@on_its_device
def _add(
    product: Tensor,
    inner: Tensor | None,
    spread: Tensor | None,
    order: Tensor | None,
    table: Tensor,
    tiles: Tensor,
    bs: list[Tensor],
    ratios: list[Tensor],
    biases: list[Tensor],
    tall: int,
) -> None:
    out, wide = product.shape[1], 128 if product.itemsize == 2 else 64
    splits, tokens, width = (1, len(product), 1) if inner is None else inner.shape
    add_segments[(len(tiles), math.ceil(out / wide))](
        product=product,
        inner=product if inner is None else inner,
        spread=product if spread is None else spread,
        order=tiles if order is None else order,
        table=table,
        tiles=tiles,
        tokens=tokens,
        out=out,
        width=width,
        splits=splits,
        ORDERED=order is not None,
        THIN=inner is not None,
        SQUARE=spread is not None,
        RATIO=bool(ratios),
        BIAS=bool(biases),
        B_TYPE=_type(bs),
        RATIO_TYPE=_type(ratios),
        BIAS_TYPE=_type(biases),
        BM=tall,
        BN=wide,
        BR=16,
        FIELDS=_FIELDS,
        DOT=_dots(product.dtype),
        ACC=accumulates(product.dtype),
        PRECISION=_precision(),
        num_warps=4,
    )


def _type(tensors: Sequence[Tensor]) -> Any:
    """What the addresses of ``tensors`` point to."""
    return getattr(tl, _NAMES[tensors[0].dtype]) if tensors else tl.float32


_multiply_op = torch.library.custom_op("trimtab::multiply_segments", _multiply, mutates_args=("into",))
_multiply_op.register_fake(lambda *given: None)
_add_op = torch.library.custom_op("trimtab::add_segments", _add, mutates_args=("product",))
_add_op.register_fake(lambda *given: None)
