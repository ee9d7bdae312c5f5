"""Dropout inside of the thin products ``d A^T``, as Triton's programs: ``d [tokens, in]`` is what dropout leaves of
``x``, and is never written. Which elements are kept follows from a seed alone, so that each pass draws the same ones
again, and nothing of the size of ``x`` is kept for the backward pass.

An element's draw is a hash of a number of its row and one of its column, 32 bits. (Triton's own ``tl.rand`` takes ten
rounds of Philox for each, some 80 operations: ten times as long as reading x takes on an H200. This takes 8.)
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.ops.kernels import triton_programs as programs
from trimtab.ops.kernels.triton import _dots, _full, _precision, accumulates, call, on_its_device, padded
from trimtab.ops.kernels.triton_programs import _loaded

RANKS = 32
"""Up to so many the programs do the products; with more of them cuBLAS does, on what dropout leaves."""
_COLUMNS, _PROGRAMS_ENOUGH, _ADDED = 128, 512, 1024


@triton.jit
def _mixed(number):
    """A hash of 32 bits in which every bit depends on every other (lowbias32, by Chris Wellons)."""
    number ^= number >> 16
    number *= 0x7FEB352D
    number ^= number >> 15
    number *= 0x846CA68B
    return number ^ (number >> 16)


@triton.jit
def _drawn(seed, rows, columns):
    """A number of 32 bits for each of ``rows`` and ``columns``."""
    whole = tl.load(seed)
    low, high = whole.to(tl.uint32), (whole >> 32).to(tl.uint32)
    of_rows = _mixed(_mixed(rows.to(tl.uint32) ^ low) ^ high)
    of_columns = _mixed(_mixed(columns.to(tl.uint32) ^ high) + low)
    return _mixed(of_rows[:, None] ^ of_columns[None, :])


@triton.jit(do_not_specialize=["tokens", "threshold"])
def drop(x, seed, into, tokens, features, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """``into = x`` where an element is kept, else 0. (Rows go along the first axis of programs, which has no bound: of
    a convolution there are millions.)"""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows < tokens)[:, None] & (columns < features)[None, :]
    kept = _drawn(seed, rows, columns) >= threshold.to(tl.uint32)
    place = rows.to(tl.int64)[:, None] * features + columns[None, :]
    tl.store(into + place, tl.load(x + place, mask=mask & kept, other=0), mask=mask)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def dropped_product(
    x,
    seed,
    a,
    into,
    tokens,
    features,
    rank,
    threshold,
    a_row,
    a_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``into = d A^T [tokens, rank]``: one walk over x, BM rows a program."""
    rows, ranks = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BR)
    in_rows, in_ranks = rows < tokens, ranks < rank
    wide = rows.to(tl.int64)
    total = tl.zeros([BM, BR], ACC)
    for start in range(0, features, BN):
        columns = start + tl.arange(0, BN)
        in_columns = columns < features
        kept = _drawn(seed, rows, columns) >= threshold.to(tl.uint32)
        values = tl.where(kept, _loaded(x + wide[:, None] * features + columns[None, :], in_rows, in_columns), 0.0)
        factor = _loaded(a + columns[:, None] * a_column + ranks[None, :] * a_row, in_columns, in_ranks)
        total += tl.dot(values.to(DOT), factor.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    place = wide[:, None] * rank + ranks[None, :]
    tl.store(into + place, total.to(into.dtype.element_ty), mask=in_rows[:, None] & in_ranks[None, :])


@triton.jit(do_not_specialize=["tokens", "threshold"])
def add_dropped(
    target,
    seed,
    inner,
    a,
    tokens,
    features,
    rank,
    threshold,
    a_row,
    a_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add ``h A`` to ``target [tokens, in]`` where an element is kept, for ``inner = h [tokens, rank]``."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, ranks = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BR)
    in_rows, in_columns, in_ranks = rows < tokens, columns < features, ranks < rank
    kept = _drawn(seed, rows, columns) >= threshold.to(tl.uint32)
    wide = rows.to(tl.int64)
    h = _loaded(inner + wide[:, None] * rank + ranks[None, :], in_rows, in_ranks)
    factor = _loaded(a + ranks[:, None] * a_row + columns[None, :] * a_column, in_ranks, in_columns)
    added = tl.dot(h.to(DOT), factor.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    place, mask = wide[:, None] * features + columns[None, :], in_rows[:, None] & in_columns[None, :]
    total = tl.load(target + place, mask=mask, other=0.0).to(ACC) + tl.where(kept, added, 0.0)
    tl.store(target + place, total.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def dropped_outer(
    x,
    seed,
    inner,
    parts,
    tokens,
    features,
    rank,
    threshold,
    STEPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What STEPS times BM rows add to ``h^T d [rank, in]``, in ``parts [row blocks, rank, in]``."""
    columns, row_block = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    ranks = tl.arange(0, BR)
    in_columns, in_ranks = columns < features, ranks < rank
    total = tl.zeros([BR, BN], ACC)
    for step in range(STEPS):
        rows = (row_block * STEPS + step) * BM + tl.arange(0, BM)
        in_rows = rows < tokens
        kept = _drawn(seed, rows, columns) >= threshold.to(tl.uint32)
        wide = rows.to(tl.int64)
        values = tl.where(kept, _loaded(x + wide[:, None] * features + columns[None, :], in_rows, in_columns), 0.0)
        h = _loaded(inner + ranks[:, None] + wide[None, :] * rank, in_ranks, in_rows)
        total += tl.dot(h.to(DOT), values.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    place = (row_block.to(tl.int64) * rank + ranks[:, None]) * features + columns[None, :]
    tl.store(parts + place, total, mask=in_ranks[:, None] & in_columns[None, :])


# How they are started -------------------------------------------------------------------------------------------------


def kept_of(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """``x`` where it is kept, else 0."""
    found: Tensor = call(torch.ops.trimtab.drop, _drop, (x, seed, threshold))
    return found


def product(rows: Tensor, a: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """``d A^T [tokens, rank]``."""
    found: Tensor = call(torch.ops.trimtab.dropped_product, _product, (rows, a, seed, threshold))
    return found


def add_input_gradient(target: Tensor, inner: Tensor, a: Tensor, seed: Tensor, threshold: int) -> None:
    """Add ``h A`` to ``target [tokens, in]`` where it is kept, for ``inner = h [tokens, rank]``."""
    call(torch.ops.trimtab.add_dropped, _add, (target, inner, a, seed, threshold))


def weight_gradient(inner: Tensor, rows: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """``h^T d [rank, in]`` in full digits."""
    found: Tensor = call(torch.ops.trimtab.dropped_outer, _outer, (inner, rows, seed, threshold))
    return found


@on_its_device
def _drop(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    x = x.contiguous()
    features = x.shape[-1] if x.dim() else 1
    tokens, into = x.numel() // max(1, features), torch.empty_like(x)
    if x.numel():
        drop[(math.ceil(tokens / 32), math.ceil(features / _COLUMNS))](
            x=x, seed=seed, into=into, tokens=tokens, features=features, threshold=threshold, BM=32, BN=_COLUMNS,
            num_warps=4,
        )  # fmt: skip
    return into


def _types(rows: Tensor, rank: int) -> dict[str, Any]:
    kind = {"BR": padded(rank), "DOT": _dots(rows.dtype), "ACC": accumulates(rows.dtype)}
    return kind | {"PRECISION": _precision(), "num_warps": 4}


def _sizes(rows: Tensor, rank: int, threshold: int) -> dict[str, int]:
    return {"tokens": rows.shape[0], "features": rows.shape[1], "rank": rank, "threshold": threshold}


@on_its_device
def _product(rows: Tensor, a: Tensor, seed: Tensor, threshold: int) -> Tensor:
    rows, into, tall = rows.contiguous(), _inner(rows, a), 16 if rows.shape[0] < 16384 else 32
    dropped_product[(math.ceil(rows.shape[0] / tall),)](
        x=rows,
        seed=seed,
        a=a,
        into=into,
        a_row=a.stride(0),
        a_column=a.stride(1),
        BM=tall,
        BN=_COLUMNS,
        **_sizes(rows, len(a), threshold),
        **_types(rows, len(a)),
    )
    return into


def _inner(rows: Tensor, a: Tensor, *given: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], len(a))


@on_its_device
def _add(target: Tensor, inner: Tensor, a: Tensor, seed: Tensor, threshold: int) -> None:
    tokens, features = target.shape
    add_dropped[(math.ceil(features / 64), math.ceil(tokens / 64))](
        target=target,
        seed=seed,
        inner=inner.contiguous(),
        a=a,
        a_row=a.stride(0),
        a_column=a.stride(1),
        BM=64,
        BN=64,
        **_sizes(target, len(a), threshold),
        **_types(target, len(a)),
    )


@on_its_device
def _outer(inner: Tensor, rows: Tensor, seed: Tensor, threshold: int) -> Tensor:
    rows, inner, into = rows.contiguous(), inner.contiguous(), _gradient(inner, rows)
    (tokens, features), tall, across = rows.shape, 32, _COLUMNS if rows.itemsize == 2 else _COLUMNS // 2
    column_blocks, row_tiles = math.ceil(features / across), math.ceil(tokens / tall)
    steps = min(16, 1 << max(0, math.floor(math.log2(max(1, column_blocks * row_tiles / _PROGRAMS_ENOUGH)))))
    row_blocks = math.ceil(row_tiles / steps)
    parts = into.new_empty(row_blocks, into.numel())
    dropped_outer[(column_blocks, row_blocks)](
        x=rows,
        seed=seed,
        inner=inner,
        parts=parts,
        STEPS=steps,
        BM=tall,
        BN=across,
        **_sizes(rows, inner.shape[1], threshold),
        **_types(rows, inner.shape[1]),
    )
    blocks = math.ceil(into.numel() / _ADDED)
    jobs: dict[str, Any] = {}
    for letter in "abcd":
        jobs |= {f"parts_{letter}": parts, f"into_{letter}": into, f"size_{letter}": into.numel()}
        jobs |= {f"count_{letter}": row_blocks, f"after_{letter}": blocks}
    programs.add_up[(blocks,)](**jobs, BLOCK=_ADDED, ACC=accumulates(rows.dtype), num_warps=4)
    return into


def _gradient(inner: Tensor, rows: Tensor, *given: Any) -> Tensor:
    return rows.new_empty(inner.shape[1], rows.shape[1], dtype=_full(rows.dtype))


_drop_op = torch.library.custom_op("trimtab::drop", _drop, mutates_args=())
_drop_op.register_fake(lambda x, seed, threshold: torch.empty_like(x))
_product_op = torch.library.custom_op("trimtab::dropped_product", _product, mutates_args=())
_product_op.register_fake(_inner)
_add_op = torch.library.custom_op("trimtab::add_dropped", _add, mutates_args=("target",))
_add_op.register_fake(lambda *given: None)
_outer_op = torch.library.custom_op("trimtab::dropped_outer", _outer, mutates_args=())
_outer_op.register_fake(_gradient)
