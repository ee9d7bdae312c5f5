"""What a square update (MoRA) does beside its matrix product, as Triton's programs: its two maps, in one walk over the
rows each, so that the matrix is one product for all chunks, groups and tokens together; and its norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.ops.kernels import triton_programs as programs
from trimtab.ops.kernels.triton import accumulates, call, on_its_device, takes

_ROWS, _COLUMNS = 16, 128


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


def add_expanded(target: Tensor, inner: Tensor, cosine: Tensor | None, sine: Tensor | None, *, side: int) -> bool:
    """Add the transpose of ``compress`` of ``inner [tokens, groups, side]`` to ``target [tokens, in]``; False for what
    the programs do not read."""
    if not (takes(target, inner, cosine, sine) and target.is_contiguous() and target.numel()):
        return False
    call(torch.ops.trimtab.add_expanded, _add_expanded, (target, inner, cosine, sine, side))
    return True


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
    programs.square_norms[(math.ceil(out / side) * math.ceil(side / _ROWS),)](
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
    into = _compressed(rows, cosine, sine, side, groups, order)
    rows = rows.contiguous()
    tokens, features = len(into), rows.shape[1]
    programs.compress[(groups * math.ceil(side / _COLUMNS), math.ceil(tokens / _ROWS))](
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


def _compressed(
    rows: Tensor, cosine: Tensor | None, sine: Tensor | None, side: int, groups: int, order: Tensor | None
) -> Tensor:
    return rows.new_empty(len(rows if order is None else order), groups, side)


@on_its_device
def _add_expanded(target: Tensor, inner: Tensor, cosine: Tensor | None, sine: Tensor | None, side: int) -> None:
    tokens, features = target.shape
    programs.add_expanded[(math.ceil(features / _COLUMNS), math.ceil(tokens / _ROWS))](
        target=target,
        inner=inner.contiguous(),
        cosine=target if cosine is None else cosine,
        sine=target if sine is None else sine,
        tokens=tokens,
        features=features,
        side=side,
        groups=inner.shape[1],
        BM=_ROWS,
        BN=_COLUMNS,
        TURN=cosine is not None,
        ACC=accumulates(target.dtype),
        num_warps=4,
    )


_compress_op = torch.library.custom_op("trimtab::compress", _compress, mutates_args=())
_compress_op.register_fake(_compressed)
_expand_op = torch.library.custom_op("trimtab::add_expanded", _add_expanded, mutates_args=("target",))
_expand_op.register_fake(lambda *given: None)
_norms_op = torch.library.custom_op("trimtab::square_norms", _squared_norms, mutates_args=())
_norms_op.register_fake(lambda weight, squares, *given: torch.empty_like(squares))
