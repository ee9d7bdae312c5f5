"""What a square update (MoRA) does beside its matrix product, as Triton's programs: its two maps, in one walk over the
rows each, so that the matrix is one product for all chunks, groups and tokens together; and its norms."""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.ops.kernels.triton import _forward_pass, accumulates, call, on_its_device, takes
from trimtab.ops.ratio import Ratio

_ROWS, _COLUMNS = 16, 128


@triton.jit(do_not_specialize=["tokens"])
def compress_rows(
    rows_in,
    order,
    cosine,
    sine,
    into,
    tokens,
    features,
    side,
    groups,
    rounds,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TURN: tl.constexpr,
    ORDERED: tl.constexpr,
    ACC: tl.constexpr,
):
    """MoRA's first map: ``into [tokens, groups, side]`` is the sum of the (turned) chunks of each group;
    ORDERED: of those rows that ``order`` names."""
    blocks = tl.cdiv(side, BN)
    group = tl.program_id(0) // blocks
    places = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    other_half = (places + side // 2) % side
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (rows < tokens)[:, None] & (places < side)[None, :]
    read = rows
    if ORDERED:
        read = tl.load(order + rows, mask=rows < tokens, other=0)
    from_rows = rows_in + read.to(tl.int64)[:, None] * features
    total = tl.zeros([BM, BN], ACC)
    for number in range(rounds):
        chunk = number * groups + group
        columns = chunk * side + places
        values = tl.load(from_rows + columns[None, :], mask=mask & (columns < features)[None, :], other=0.0).to(ACC)
        if TURN:
            in_table = (places < side) & (chunk * side < features)
            swapped = chunk * side + other_half
            others = tl.load(from_rows + swapped[None, :], mask=mask & (swapped < features)[None, :], other=0.0).to(ACC)
            values *= tl.load(cosine + columns, mask=in_table, other=0.0).to(ACC)[None, :]
            values -= others * tl.load(sine + columns, mask=in_table, other=0.0).to(ACC)[None, :]
        total += values
    place = (rows.to(tl.int64)[:, None] * groups + group) * side + places[None, :]
    tl.store(into + place, total.to(into.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def add_expanded_rows(
    target,
    inner,
    order,
    cosine,
    sine,
    tokens,
    features,
    side,
    groups,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TURN: tl.constexpr,
    ORDERED: tl.constexpr,
    ACC: tl.constexpr,
):
    """The transpose of ``compress_rows``, added to ``target [tokens, features]``; ORDERED: to those of its rows that
    ``order`` names."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    in_columns = columns < features
    mask = (rows < tokens)[:, None] & in_columns[None, :]
    start, place = (columns // side) % groups * side, columns % side
    from_inner = inner + rows.to(tl.int64)[:, None] * (groups * side)
    added = tl.load(from_inner + (start + place)[None, :], mask=mask, other=0.0).to(ACC)
    if TURN:
        others = tl.load(from_inner + (start + (place + side // 2) % side)[None, :], mask=mask, other=0.0).to(ACC)
        added *= tl.load(cosine + columns, mask=in_columns, other=0.0).to(ACC)[None, :]
        added += others * tl.load(sine + columns, mask=in_columns, other=0.0).to(ACC)[None, :]
    if ORDERED:
        rows = tl.load(order + rows, mask=rows < tokens, other=0)
    into = target + rows.to(tl.int64)[:, None] * features + columns[None, :]
    total = tl.load(into, mask=mask, other=0.0).to(ACC) + added
    tl.store(into, total.to(target.dtype.element_ty), mask=mask)


@triton.jit
def norms_of_rows(
    weight,
    squares,
    matrix,
    cosine,
    sine,
    into,
    out,
    features,
    side,
    groups,
    rounds,
    weight_row,
    weight_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TURN: tl.constexpr,
    ACC: tl.constexpr,
):
    """``||W||^2 + <2 W + dV, dV>`` of BM rows, over those columns of W where MoRA's dV is not zero."""
    blocks = tl.cdiv(side, BM)
    place = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    rows = (tl.program_id(0) // blocks) * side + place
    group = (tl.program_id(0) // blocks) % groups
    in_rows = (place < side) & (rows < out)
    from_weight = weight + rows.to(tl.int64)[:, None] * weight_row
    total = tl.zeros([BM], ACC)
    for number in range(rounds):
        chunk = number * groups + group
        for start in range(0, side, BN):
            places = start + tl.arange(0, BN)
            columns = chunk * side + places
            in_columns = (places < side) & (columns < features)
            mask = in_rows[:, None] & in_columns[None, :]
            delta = tl.load(matrix + place[:, None] * side + places[None, :], mask=mask, other=0.0).to(ACC)
            if TURN:
                swapped = (places + side // 2) % side
                others = tl.load(matrix + place[:, None] * side + swapped[None, :], mask=mask, other=0.0).to(ACC)
                delta *= tl.load(cosine + columns, mask=in_columns, other=0.0).to(ACC)[None, :]
                delta += others * tl.load(sine + columns, mask=in_columns, other=0.0).to(ACC)[None, :]
            w = tl.load(from_weight + columns.to(tl.int64)[None, :] * weight_column, mask=mask, other=0.0).to(ACC)
            total += tl.sum(delta * (2 * w + delta), 1)
    total += tl.load(squares + rows, mask=in_rows, other=0.0).to(ACC)
    tl.store(into + rows, tl.maximum(total, 0.0).to(into.dtype.element_ty), mask=in_rows)


# How they are started -------------------------------------------------------------------------------------------------


def compress(
    rows: Tensor, cosine: Tensor | None, sine: Tensor | None, *, side: int, groups: int, order: Tensor | None = None
) -> Tensor | None:
    """``[tokens, groups, side]``: the chunks of ``rows [tokens, in]``, turned by the angles whose cosine and sine
    ``[chunks, side]`` are given, and added up in their groups; ``order``: of those rows. None for what the programs do
    not read."""
    if not (takes(rows, cosine, sine) and rows.numel()):
        return None
    compressed: Tensor = call(torch.ops.trimtab.compress, _compress, (rows, cosine, sine, side, groups, order))
    return compressed


def add_expanded(
    target: Tensor,
    inner: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    *,
    side: int,
    order: Tensor | None = None,
) -> bool:
    """Add the transpose of ``compress`` of ``inner [tokens, groups, side]`` to ``target [tokens, in]``, or to those
    rows of it that ``order`` names; False for what the programs do not read."""
    if not (takes(target, inner, cosine, sine) and target.is_contiguous() and target.numel()):
        return False
    call(torch.ops.trimtab.add_expanded, _add_expanded, (target, inner, cosine, sine, side, order))
    return True


def forward_of_spread(
    product: Tensor, spread: Tensor, *, ratio: Ratio | None, bias: Tensor | None, in_place: bool
) -> Tensor | None:
    """``c (p + u) + bias`` for ``spread [tokens, side]``, of which u is repeated until a row is full; and what is left
    in ``product``, as ``forward`` has it. None for what the program does not read."""
    values = None if ratio is None else ratio.values
    if not (product.is_contiguous() and takes(product, values, spread, bias)):
        return None
    in_place = in_place or (ratio is None and bias is None)
    output = None if in_place else torch.empty_like(product)
    given = (product, output, spread, None, 1.0, values, bias, True, False)
    call(torch.ops.trimtab.forward_pass, _forward_pass, given)
    return product if output is None else output


def squared_norms(
    weight: Tensor,
    squares: Tensor,
    matrix: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    *,
    groups: int,
) -> Tensor | None:
    """``||W + dV||^2`` per row ``[out]``, for ``matrix = M [side, side]``. None for what the programs do not read."""
    if not takes(weight, squares, matrix, cosine, sine):
        return None
    given = (weight, squares, matrix, cosine, sine, groups)
    norms: Tensor = call(torch.ops.trimtab.square_norms, _squared_norms, given)
    return norms


@on_its_device
def _squared_norms(
    weight: Tensor, squares: Tensor, matrix: Tensor, cosine: Tensor | None, sine: Tensor | None, groups: int
) -> Tensor:
    (out, features), side, into = weight.shape, len(matrix), torch.empty_like(squares)
    norms_of_rows[(math.ceil(out / side) * math.ceil(side / _ROWS),)](
        weight=weight,
        squares=squares,
        matrix=matrix.contiguous(),
        cosine=weight if cosine is None else cosine,
        sine=weight if sine is None else sine,
        into=into,
        out=out,
        features=features,
        side=side,
        groups=groups,
        rounds=math.ceil(math.ceil(features / side) / groups),
        weight_row=weight.stride(0),
        weight_column=weight.stride(1),
        BM=_ROWS,
        BN=_COLUMNS,
        TURN=cosine is not None,
        ACC=accumulates(squares.dtype),
        num_warps=4,
    )
    return into


@on_its_device
def _compress(
    rows: Tensor, cosine: Tensor | None, sine: Tensor | None, side: int, groups: int, order: Tensor | None
) -> Tensor:
    into = _compressed(rows, side=side, groups=groups, order=order)
    rows = rows.contiguous()
    tokens, features = len(into), rows.shape[1]
    compress_rows[(groups * math.ceil(side / _COLUMNS), math.ceil(tokens / _ROWS))](
        rows_in=rows,
        order=rows if order is None else order,
        cosine=rows if cosine is None else cosine,
        sine=rows if sine is None else sine,
        into=into,
        tokens=tokens,
        features=features,
        side=side,
        groups=groups,
        rounds=math.ceil(math.ceil(features / side) / groups),
        BM=_ROWS,
        BN=_COLUMNS,
        TURN=cosine is not None,
        ORDERED=order is not None,
        ACC=accumulates(rows.dtype),
        num_warps=4,
    )
    return into


def _compressed(rows: Tensor, *, side: int, groups: int, order: Tensor | None) -> Tensor:
    return rows.new_empty(len(rows if order is None else order), groups, side)


@on_its_device
def _add_expanded(
    target: Tensor, inner: Tensor, cosine: Tensor | None, sine: Tensor | None, side: int, order: Tensor | None
) -> None:
    tokens, features = len(inner), target.shape[1]
    add_expanded_rows[(math.ceil(features / _COLUMNS), math.ceil(tokens / _ROWS))](
        target=target,
        inner=inner.contiguous(),
        order=inner if order is None else order,
        cosine=target if cosine is None else cosine,
        sine=target if sine is None else sine,
        tokens=tokens,
        features=features,
        side=side,
        groups=inner.shape[1],
        BM=_ROWS,
        BN=_COLUMNS,
        TURN=cosine is not None,
        ORDERED=order is not None,
        ACC=accumulates(target.dtype),
        num_warps=4,
    )


_compress_op = torch.library.custom_op("trimtab::compress", _compress, mutates_args=())
_compress_op.register_fake(
    lambda rows, cosine, sine, side, groups, order: _compressed(rows, side=side, groups=groups, order=order)
)
_expand_op = torch.library.custom_op("trimtab::add_expanded", _add_expanded, mutates_args=("target",))
_expand_op.register_fake(lambda *given: None)
_norms_op = torch.library.custom_op("trimtab::square_norms", _squared_norms, mutates_args=())
_norms_op.register_fake(lambda weight, squares, *given: torch.empty_like(squares))
