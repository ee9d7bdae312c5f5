"""A batch whose rows belong to different updates, as Triton's programs: each update has a segment of the rows, and one
launch goes through all segments.

    multiply_segments    ``x F^T`` for the rows of each segment, F its own: A of a thin update, M of a square one;
                         or ``x F``
    add_segments         ``c (p + s h B^T + u) + bias`` in place of p, each segment with its own c, s, B and bias

What a segment has is a line of a table on the device, in which tensors are addresses: so nothing is copied together,
whatever the ranks and however many the adapters. A tile is some rows of one segment, and a program takes one tile; rows
are found by ``order``, so that neither the batch nor the product is sorted in memory.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.ops.kernels.triton import _NAMES, _dots, _precision, accumulates, on_its_device, padded
from trimtab.ops.kernels.triton_programs import _loaded

FIELDS = 8
"""Of a segment's line: the address of F, its rows, the address of B, the bits of s, the addresses of c and of the bias;
where in ``spread`` its first place is, and how many numbers a place has there."""


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
    TURNED: tl.constexpr,
    FIELDS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x F^T`` over ``per_split`` of the features, in ``into [splits, tokens, width]``, sorted by segments. TURNED:
    F is ``[features, rows]``."""
    segment, places, in_rows, rows = _tile(tiles, order, BM, ORDERED)
    count = tl.load(table + segment * FIELDS + 1)
    split, first = tl.program_id(1), tl.program_id(2) * BN
    if first < count:
        factor = tl.load(table + segment * FIELDS).to(tl.pointer_type(TYPE))
        columns = first + tl.arange(0, BN)
        in_columns = columns < count
        total = tl.zeros([BM, BN], ACC)
        wide, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
        for start in range(split * per_split, tl.minimum((split + 1) * per_split, features), BK):
            inner = start + tl.arange(0, BK)
            in_inner = inner < features
            values = _loaded(x + wide[:, None] * features + inner[None, :], in_rows, in_inner)
            if TURNED:
                others = _loaded(factor + inner[:, None] * count + wide_columns[None, :], in_inner, in_columns)
            else:
                others = _loaded(factor + inner[:, None] + wide_columns[None, :] * features, in_inner, in_columns)
            total += tl.dot(values.to(DOT), others.to(DOT), input_precision=PRECISION, out_dtype=ACC)
        place = (split.to(tl.int64) * tokens + places)[:, None] * width + columns[None, :]
        tl.store(into + place, total.to(into.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["tokens", "splits"])
def add_segments(
    product,
    output,
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
    KEEP: tl.constexpr,
    TURNED: tl.constexpr,
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
    square update has in ``spread``, repeated until a row is full. With KEEP the sum before the ratio stays in
    ``product`` and ``output`` gets the result. TURNED: B is ``[rank, out]``."""
    segment, places, in_rows, rows = _tile(tiles, order, BM, ORDERED)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    in_columns = columns < out
    mask = in_rows[:, None] & in_columns[None, :]
    place = rows.to(tl.int64)[:, None] * out + columns[None, :]
    total = tl.load(product + place, mask=mask, other=0.0).to(ACC)
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
            if TURNED:
                factor = _loaded(b + ranks.to(tl.int64)[:, None] * out + columns[None, :], in_ranks, in_columns)
            else:
                factor = _loaded(b + ranks[:, None] + columns.to(tl.int64)[None, :] * rank, in_ranks, in_columns)
            total += tl.dot((h * scale).to(DOT), factor.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    if SQUARE:
        around = tl.load(line + 7)
        from_spread = spread + tl.load(line + 6) + places.to(tl.int64)[:, None] * around
        total += tl.load(from_spread + (columns % tl.maximum(around, 1))[None, :], mask=mask & (around > 0), other=0.0)
    if KEEP:
        tl.store(product + place, total.to(product.dtype.element_ty), mask=mask)
    if RATIO:
        c = tl.load(line + 4)
        total *= tl.load(c.to(tl.pointer_type(RATIO_TYPE)) + columns, mask=in_columns & (c != 0), other=1.0).to(ACC)
    if BIAS:
        bias = tl.load(line + 5)
        total += tl.load(bias.to(tl.pointer_type(BIAS_TYPE)) + columns, mask=in_columns & (bias != 0), other=0.0).to(
            ACC
        )
    into = output if KEEP else product
    tl.store(into + place, total.to(product.dtype.element_ty), mask=mask)


# How they are started -------------------------------------------------------------------------------------------------


@on_its_device
def multiply(
    into: Tensor,
    rows: Tensor,
    order: Tensor | None,
    table: Tensor,
    tiles: Tensor,
    factors: list[Tensor],
    most: int,
    tall: int,
    turned: bool,
) -> None:
    """``most``: the rows of the largest factor, or its columns where they are ``turned``."""
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
        TYPE=pointed_to(factors),
        BM=tall,
        BN=wide,
        BK=deep,
        TURNED=turned,
        FIELDS=FIELDS,
        DOT=_dots(rows.dtype),
        ACC=accumulates(rows.dtype),
        PRECISION=_precision(),
        num_warps=4,
    )


@on_its_device
def add(
    product: Tensor,
    output: Tensor | None,
    inner: Tensor | None,
    spread: Tensor | None,
    order: Tensor | None,
    table: Tensor,
    tiles: Tensor,
    bs: list[Tensor],
    ratios: list[Tensor],
    biases: list[Tensor],
    tall: int,
    turned: bool,
) -> None:
    out, wide = product.shape[1], 128 if product.itemsize == 2 else 64
    splits, tokens, width = (1, len(product), 1) if inner is None else inner.shape
    add_segments[(len(tiles), math.ceil(out / wide))](
        product=product,
        output=product if output is None else output,
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
        KEEP=output is not None,
        TURNED=turned,
        B_TYPE=pointed_to(bs),
        RATIO_TYPE=pointed_to(ratios),
        BIAS_TYPE=pointed_to(biases),
        BM=tall,
        BN=wide,
        BR=16,
        FIELDS=FIELDS,
        DOT=_dots(product.dtype),
        ACC=accumulates(product.dtype),
        PRECISION=_precision(),
        num_warps=4,
    )


def pointed_to(tensors: Sequence[Tensor]) -> Any:
    """What the addresses of ``tensors`` point to."""
    return getattr(tl, _NAMES[tensors[0].dtype]) if tensors else tl.float32


_multiply_op = torch.library.custom_op("trimtab::multiply_segments", multiply, mutates_args=("into",))
_multiply_op.register_fake(lambda *given: None)
_add_op = torch.library.custom_op("trimtab::add_segments", add, mutates_args=("product", "output"))
_add_op.register_fake(lambda *given: None)
