"""The gradients of a batch whose rows belong to different updates, as Triton's programs: what
``triton_segment_programs`` does for the forward pass, for the backward pass.

    backward_segments    over ``dy`` and ``p``: ``c dy``, ``s (c dy)^T h``, ``s (c dy) B``, ``sum dy p`` and ``sum dy``
    outer_segments       ``h^T x`` of each segment, the gradient of its A; of its M with ``u`` and x as MoRA's maps
                         give them
    add_up_segments      adds up what the tiles of each segment left, in a fixed order
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.ops.kernels.triton import _dots, _full, _precision, accumulates, on_its_device, padded
from trimtab.ops.kernels.triton_programs import _loaded
from trimtab.ops.kernels.triton_segment_programs import FIELDS, pointed_to

_ROWS, _ADDED = 32, 1024


@triton.jit(do_not_specialize=["tokens", "splits"])
def backward_segments(
    grad,
    product,
    inner,
    scaled,
    parts_inner,
    parts,
    order,
    table,
    tiles,
    tokens,
    out,
    width,
    splits,
    ORDERED: tl.constexpr,
    THIN: tl.constexpr,
    RATIO: tl.constexpr,
    SUMS: tl.constexpr,
    B_TYPE: tl.constexpr,
    RATIO_TYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    FIELDS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile's rows and BN columns a program. ``parts [tiles, out * width + 2 out]`` has what this tile adds to the
    gradient of B, to ``sum dy p`` and to ``sum dy``; ``parts_inner [column blocks, tokens, width]`` what these columns
    add to that of h."""
    tile, block = tl.program_id(0), tl.program_id(1)
    segment, start, stop = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    line = table + segment * FIELDS
    columns, ranks = block * BN + tl.arange(0, BN), tl.arange(0, BR)
    in_columns = columns < out
    total_sums, total_product = tl.zeros([BN], ACC), tl.zeros([BN], ACC)
    rank = tl.load(line + 1)
    in_ranks = ranks < rank
    if RATIO:
        address = tl.load(line + 4)
        c = tl.load(address.to(tl.pointer_type(RATIO_TYPE)) + columns, mask=in_columns & (address != 0), other=1.0)
        c = c.to(ACC)
    if THIN:
        total_b = tl.zeros([BN, BR], ACC)
        scale = tl.load(line + 3).to(tl.float64, bitcast=True).to(ACC)
        b = tl.load(line + 2).to(tl.pointer_type(B_TYPE))
        factor = _loaded(b + columns.to(tl.int64)[:, None] * rank + ranks[None, :], in_columns, in_ranks).to(DOT)
    for first in range(start, stop, BM):
        places = first + tl.arange(0, BM)
        in_rows = places < stop
        rows = places
        if ORDERED:
            rows = tl.load(order + places, mask=in_rows, other=0)
        mask = in_rows[:, None] & in_columns[None, :]
        at = rows.to(tl.int64)[:, None] * out + columns[None, :]
        dy = tl.load(grad + at, mask=mask, other=0.0)
        full = dy.to(ACC)
        if SUMS:
            total_sums += tl.sum(full, 0)
        if RATIO:
            total_product += tl.sum(full * tl.load(product + at, mask=mask & (address != 0), other=0.0).to(ACC), 0)
            dy = (full * c[None, :]).to(dy.dtype)
            tl.store(scaled + at, dy, mask=mask)
        if THIN:
            in_h = in_rows[:, None] & in_ranks[None, :]
            h = tl.zeros([BM, BR], ACC)
            for split in range(splits):
                from_inner = inner + (split * tokens + places).to(tl.int64)[:, None] * width
                h += tl.load(from_inner + ranks[None, :], mask=in_h, other=0.0)
            dy = dy.to(DOT)
            total_b += tl.dot(tl.trans(dy), h.to(DOT), input_precision=PRECISION, out_dtype=ACC)
            dh = tl.dot(dy, factor, input_precision=PRECISION, out_dtype=ACC)
            into = (block.to(tl.int64) * tokens + places)[:, None] * width + ranks[None, :]
            in_width = in_rows[:, None] & (ranks < width)[None, :]
            tl.store(parts_inner + into, dh * scale, mask=in_width)
    mine = parts + tile.to(tl.int64) * out * (width + 2)
    if THIN:
        at_b = columns.to(tl.int64)[:, None] * width + ranks[None, :]
        tl.store(mine + at_b, total_b * scale, mask=in_columns[:, None] & (ranks < width)[None, :])
    if RATIO:
        tl.store(mine + out * width + columns, total_product, mask=in_columns)
    if SUMS:
        tl.store(mine + out * (width + 1) + columns, total_sums, mask=in_columns)


@triton.jit(do_not_specialize=["tokens"])
def outer_segments(
    x,
    inner,
    parts,
    order,
    tiles,
    tokens,
    features,
    width,
    ORDERED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a tile's rows add to ``h^T x [width, in]``, in ``parts [tiles, width, in]``."""
    tile = tl.program_id(0)
    start, stop = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    columns, ranks = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2) * BR + tl.arange(0, BR)
    in_columns, in_ranks = columns < features, ranks < width
    total = tl.zeros([BR, BN], ACC)
    for first in range(start, stop, BM):
        places = first + tl.arange(0, BM)
        in_rows = places < stop
        rows = places
        if ORDERED:
            rows = tl.load(order + places, mask=in_rows, other=0)
        values = _loaded(x + rows.to(tl.int64)[:, None] * features + columns[None, :], in_rows, in_columns)
        h = _loaded(inner + ranks[:, None] + places.to(tl.int64)[None, :] * width, in_ranks, in_rows)
        total += tl.dot(h.to(DOT), values.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    at = (tile.to(tl.int64) * width + ranks[:, None]) * features + columns[None, :]
    tl.store(parts + at, total, mask=in_ranks[:, None] & in_columns[None, :])


@triton.jit
def add_up_segments(parts, into, spans, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """``into [segments, size]``: the sum of those ``parts [tiles, size]`` that ``spans`` gives a segment."""
    segment = tl.program_id(0)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    total = tl.zeros([BLOCK], ACC)
    first, end = tl.load(spans + 2 * segment), tl.load(spans + 2 * segment + 1)
    parts += first * size + places  # (64 bits, as the spans are)
    for _ in range(first, end):
        total += tl.load(parts, mask=mask, other=0.0)
        parts += size
    tl.store(into + segment.to(tl.int64) * size + places, total, mask=mask)


# How they are started -------------------------------------------------------------------------------------------------


@on_its_device
def backward(
    grad: Tensor,
    product: Tensor | None,
    inner: Tensor | None,
    order: Tensor | None,
    table: Tensor,
    tiles: Tensor,
    bs: list[Tensor],
    ratios: list[Tensor],
    wants_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``c dy``, what columns add to the gradient of h, and what tiles add to the others."""
    scaled, parts_inner, parts = results(grad, product, inner, tiles)
    splits, tokens, width = (1, len(grad), 0) if inner is None else inner.shape
    backward_segments[(len(tiles), math.ceil(grad.shape[1] / _wide(grad)))](
        grad=grad,
        product=grad if product is None else product,
        inner=grad if inner is None else inner,
        scaled=scaled,
        parts_inner=parts_inner,
        parts=parts,
        order=tiles if order is None else order,
        table=table,
        tiles=tiles,
        tokens=tokens,
        out=grad.shape[1],
        width=width,
        splits=splits,
        ORDERED=order is not None,
        THIN=inner is not None,
        RATIO=product is not None,
        SUMS=wants_sums,
        B_TYPE=pointed_to(bs),
        RATIO_TYPE=pointed_to(ratios),
        BM=_ROWS,
        BN=_wide(grad),
        BR=padded(max(1, width)),
        FIELDS=FIELDS,
        DOT=_dots(grad.dtype),
        ACC=accumulates(grad.dtype),
        PRECISION=_precision(),
        num_warps=4 if width <= 16 else 8,
    )
    return scaled, parts_inner, parts


def _wide(grad: Tensor) -> int:
    return 128 if grad.itemsize == 2 else 64


def results(grad: Tensor, product: Tensor | None, inner: Tensor | None, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, out), width = grad.shape, 0 if inner is None else inner.shape[2]
    full = _full(grad.dtype)
    return (
        grad.new_empty(0 if product is None else (tokens, out)),
        grad.new_empty(math.ceil(out / _wide(grad)), tokens, width, dtype=full),
        grad.new_empty(len(tiles), out * (width + 2), dtype=full),
    )


@on_its_device
def outer(inner: Tensor, rows: Tensor, order: Tensor | None, tiles: Tensor) -> Tensor:
    """What the tiles add to ``h^T x``, for ``inner = h [tokens, width]``, sorted."""
    (tokens, width), features = inner.shape, rows.shape[1]
    parts, wide = _outer_parts(inner, rows, tiles), min(64, padded(width))
    outer_segments[(len(tiles), math.ceil(features / 128), math.ceil(width / wide))](
        x=rows,
        inner=inner,
        parts=parts,
        order=tiles if order is None else order,
        tiles=tiles,
        tokens=tokens,
        features=features,
        width=width,
        ORDERED=order is not None,
        BM=_ROWS,
        BN=128,
        BR=wide,
        DOT=_dots(rows.dtype),
        ACC=accumulates(rows.dtype),
        PRECISION=_precision(),
        num_warps=4,
    )
    return parts


def _outer_parts(inner: Tensor, rows: Tensor, tiles: Tensor) -> Tensor:
    return inner.new_empty(len(tiles), inner.shape[1] * rows.shape[1], dtype=_full(inner.dtype))


@on_its_device
def add_up(parts: Tensor, spans: Tensor) -> Tensor:
    """``[segments, size]`` of ``parts [tiles, size]``; ``spans [segments, 2]``: the first tile of each, and the end."""
    into, size = parts.new_empty(len(spans), parts.shape[1]), parts.shape[1]
    add_up_segments[(len(spans), math.ceil(size / _ADDED))](
        parts=parts, into=into, spans=spans, size=size, BLOCK=_ADDED, ACC=accumulates(parts.dtype), num_warps=4
    )
    return into


_backward_op = torch.library.custom_op("trimtab::backward_segments", backward, mutates_args=())
_backward_op.register_fake(lambda grad, product, inner, order, table, tiles, *_: results(grad, product, inner, tiles))
_outer_op = torch.library.custom_op("trimtab::outer_segments", outer, mutates_args=())
_outer_op.register_fake(lambda inner, rows, order, tiles: _outer_parts(inner, rows, tiles))
_add_up_op = torch.library.custom_op("trimtab::add_up_segments", add_up, mutates_args=())
_add_up_op.register_fake(lambda parts, spans: parts.new_empty(len(spans), parts.shape[1]))
