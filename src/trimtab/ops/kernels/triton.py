"""The passes as Triton's programs, for matrices on a GPU: one walk over a product forward, one over ``dy`` and ``y``
backward.

What bounds them is memory: at rank 16 in bfloat16 a pass does 32 operations an element and moves 4 bytes, where an
H200 does some 200 for each byte. So the large products stay with cuBLAS, which nothing of ours would beat, and the
passes read and write each ``[tokens, out]`` once. See ``docs/explanation/kernels.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor, nn

from trimtab.ops.autocast import cast
from trimtab.ops.kernels import plain, triton_programs as programs
from trimtab.ops.kernels.contract import BackwardPass, Thin
from trimtab.ops.ratio import Ratio

INTERPRETED = hasattr(programs.add_up, "rewrite") or "Interpreted" in type(programs.add_up).__name__
"""Whether the programs run on a processor, number by number: for tests."""

FORWARD_BYTES, BACKWARD_RANKS = 128, 32
"""The ranks (in bytes of a row of h; in numbers) up to which a pass multiplies with B itself. With more, products are
no longer thin, and cuBLAS does them: forward, a block would read more of h and B than of p; backward, what is left to
add up, ``8 * rank`` bytes for 128 columns of a token, would be more than two products read once more, ``4 * 128``."""

_PROGRAMS_ENOUGH = 512
"""So many programs keep the 132 multiprocessors of an H100 or H200 busy, four each; more only leave more to add up."""

_ADDED = 1024
"""So many sums a program finishes."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32", torch.float64: "float64"}


class Sizes(NamedTuple):
    """The block of a program, and how many warps share it."""

    rows: int
    columns: int
    warps: int


def forward_sizes(tokens: int) -> Sizes:
    """32 numbers a thread, so that some blocks have room on a multiprocessor and hide each other's waiting."""
    return Sizes(16, 128, 4) if tokens <= 16 else Sizes(64, 64, 4)


def backward_sizes(tokens: int) -> Sizes:
    """Wide blocks, since each leaves ``4 * rank`` bytes a token to add up beside the ``6 * columns`` it moves; 128
    columns are what the registers of eight warps hold, or all but (``python tests/tools/compiled_kernels.py``)."""
    return Sizes(16 if tokens <= 16 else 32, 128, 8)


def norm_sizes(itemsize: int) -> Sizes:
    """Of a weight with ``itemsize`` bytes a number."""
    return Sizes(32, 256 // itemsize, 4)


def takes(*tensors: Tensor | None) -> bool:
    """Whether the programs read these: plain tensors of the dtypes that they were checked in."""
    known = (*_DTYPES, torch.float64) if INTERPRETED else _DTYPES
    return all(tensor is None or tensor.dtype in known for tensor in tensors)


def forward(product: Tensor, *, thin: Thin | None, ratio: Ratio | None, bias: Tensor | None, in_place: bool) -> Tensor:
    """``c (p + s h B^T) + bias``. Afterwards ``product`` holds ``p + s h B^T``, or with ``in_place`` the output."""
    values = None if ratio is None else ratio.values
    inner, b, scale = (None, None, 1.0) if thin is None else thin
    if not (product.is_contiguous() and takes(product, values, inner, b, bias)):
        return plain.forward(product, thin=thin, ratio=ratio, bias=bias, in_place=in_place)
    if inner is not None and inner.shape[1] * inner.dtype.itemsize > FORWARD_BYTES:
        plain.forward(product, thin=thin, ratio=None, bias=None, in_place=True)
        inner = b = None
    if inner is None and ratio is None and bias is None:
        return product
    in_place = in_place or (ratio is None and bias is None)
    output = None if in_place else torch.empty_like(product)
    given = (product, output, inner, b, scale, values, bias, thin is not None, False)
    call(torch.ops.trimtab.forward_pass, _forward_pass, given)
    return product if output is None else output


def backward(
    grad: Tensor,
    *,
    thin: Thin | None,
    ratio: Ratio | None,
    witness: Tensor | None,
    wants_bias: bool,
    wants_scaled: bool,
) -> BackwardPass:
    """What is asked for of ``grad = dy [tokens, out]``; ``witness`` is ``y [tokens, out]``."""
    values = None if ratio is None else ratio.values
    inner, b, scale = (None, None, 1.0) if thin is None else thin
    if not takes(grad, values, inner, b, witness):
        asked = {"wants_bias": wants_bias, "wants_scaled": wants_scaled}
        return plain.backward(grad, thin=thin, ratio=ratio, witness=witness, **asked)
    if b is not None and b.shape[1] > BACKWARD_RANKS:
        passed = backward(
            grad, thin=None, ratio=ratio, witness=witness, wants_bias=wants_bias, wants_scaled=wants_scaled
        )
        left = None if wants_scaled else ratio
        products = plain.backward(
            passed.grad, thin=thin, ratio=left, witness=None, wants_bias=False, wants_scaled=False
        )
        return products._replace(grad=passed.grad, bias=passed.bias, witnessed=passed.witnessed)
    scales = wants_scaled and ratio is not None
    if thin is None and not (scales or wants_bias or witness is not None):
        return BackwardPass(grad)
    given = (grad, witness, inner, b, scale, values, wants_bias, scales)
    scaled, sums, witnessed, grad_inner, grad_b = call(torch.ops.trimtab.backward_pass, _backward_pass, given)
    return BackwardPass(
        scaled if scales else grad,
        sums if wants_bias else None,
        None if witness is None else witnessed,
        None if thin is None else grad_inner,
        None if thin is None else grad_b,
    )


def squared_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """``||W + s B A||^2`` per row ``[out]`` in the dtype of ``squares``, which is ``||W||^2``."""
    if len(a) > BACKWARD_RANKS or not a.numel() or not takes(weight, squares, a, b):
        return plain.squared_norms(weight, squares, a, b, scale=scale)
    full = cast(a, squares.dtype)
    norms: Tensor = call(torch.ops.trimtab.squared_norms, _squared_norms, (weight, squares, full, b, scale))
    return norms


def fold(weight: Tensor, ratio: Tensor | None, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """``c (W + s B A) [out, in]``: the forward pass over W, with a ratio for each row."""
    fits = len(a) * 4 <= FORWARD_BYTES and a.numel() and weight.is_contiguous() and takes(weight, ratio, a, b)
    if not fits:
        return plain.fold(weight, ratio, a, b, scale=scale)
    folded: Tensor = call(torch.ops.trimtab.fold, _fold, (weight, ratio, a, cast(b, _full(weight.dtype)), scale))
    return folded


def call(op: Any, program: Any, given: tuple[Any, ...]) -> Any:
    """What ``program`` gives. By way of ``op``, which ``torch.compile`` and tensors without numbers know, only for
    those: the way through the dispatcher takes longer than starting a program."""
    plainly = type(given[0]) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return program(*given) if plainly else op(*given)


def on_its_device(program: Callable[..., Any]) -> Callable[..., Any]:
    """``program`` on the device of its first tensor: Triton starts programs on the current one, which a model that lies
    on several devices need not be at."""

    @wraps(program)
    def started(first: Tensor, *others: Any, **named: Any) -> Any:
        if first.device.type == "cpu":
            return program(first, *others, **named)
        with torch.get_device_module(first.device).device(first.device):
            return program(first, *others, **named)

    return started


def accumulates(dtype: torch.dtype) -> Any:
    return getattr(tl, _NAMES[_full(dtype)])


def _dots(dtype: torch.dtype) -> Any:
    """The type of the numbers that are multiplied. (The interpreter takes bfloat16 for whole numbers there.)"""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else getattr(tl, _NAMES[dtype])


def _precision() -> str:
    """How float32 is multiplied: as torch's own products are."""
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    strides = {}
    for name, tensor in tensors.items():
        strides[f"{name}_row"], strides[f"{name}_column"] = (0, 0) if tensor is None else tensor.stride()
    return strides


@on_its_device
def _forward_pass(
    product: Tensor,
    output: Tensor | None,
    inner: Tensor | None,
    b: Tensor | None,
    scale: float,
    ratio: Tensor | None,
    bias: Tensor | None,
    keeps: bool,
    by_rows: bool,
) -> None:
    """Without ``b``, ``inner`` itself is added, repeated until a row is full. ``keeps``: the sum before the ratio goes
    to ``product``, and the output to a place of its own. ``by_rows``: the ratio has a number for each row."""
    tokens, out = product.shape
    if not product.numel():
        return
    rank = 1 if inner is None else inner.shape[1]
    sizes = forward_sizes(tokens)
    grid = (math.ceil(out / sizes.columns), math.ceil(tokens / sizes.rows))
    given = {"inner": inner, "b": b, "ratio": ratio, "bias": bias}
    programs.forward_pass[grid](
        product=product,
        output=product if output is None else output,
        **{name: product if one is None else one for name, one in given.items()},
        tokens=tokens,
        out=out,
        rank=rank,
        **_strides(inner=inner, b=b),
        SCALE=scale,
        BM=sizes.rows,
        BN=sizes.columns,
        BR=16 if b is None else padded(rank),
        THIN=b is not None,
        SPREAD=inner is not None and b is None,
        RATIO=ratio is not None,
        BIAS=bias is not None,
        BY_ROWS=by_rows,
        KEEP=keeps and output is not None and inner is not None,
        DOT=_dots(product.dtype if inner is None else inner.dtype),
        ACC=accumulates(product.dtype),
        PRECISION=_precision(),
        num_warps=sizes.warps,
    )


def _fold(weight: Tensor, ratio: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    total = torch.empty_like(weight)
    _forward_pass(weight, total, b, a.t(), scale=scale, ratio=ratio, bias=None, keeps=False, by_rows=True)
    return total


def padded(rank: int) -> int:
    """The rank that a program computes with: a power of two, and 16 at least, which the tensor cores ask for."""
    return max(16, 1 << (rank - 1).bit_length())


@on_its_device
def _backward_pass(
    grad: Tensor,
    witness: Tensor | None,
    inner: Tensor | None,
    b: Tensor | None,
    scale: float,
    ratio: Tensor | None,
    wants_sums: bool,
    wants_scaled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, witness = grad.contiguous(), None if witness is None else witness.contiguous()
    asked = {"wants_sums": wants_sums, "wants_scaled": wants_scaled}
    found = _backward_results(grad, witness, inner, b, scale=scale, ratio=ratio, **asked)
    scaled, sums, witnessed, grad_inner, grad_b = found
    (tokens, out), rank = grad.shape, 1 if b is None else b.shape[1]
    if not grad.numel():
        for one in found:
            one.zero_()
        return found
    sizes = backward_sizes(tokens)
    column_blocks, row_tiles = math.ceil(out / sizes.columns), math.ceil(tokens / sizes.rows)
    steps = 1 << max(0, math.floor(math.log2(max(1, column_blocks * row_tiles / _PROGRAMS_ENOUGH))))
    steps = min(steps, 16)
    row_blocks = math.ceil(row_tiles / steps)
    counts = (column_blocks, row_blocks, row_blocks, row_blocks)
    into = (grad_inner, grad_b, sums, witnessed)
    parts = [
        grad.new_empty(count if one.numel() else 0, one.numel(), dtype=_full(grad.dtype))
        for one, count in zip(into, counts, strict=True)
    ]
    given = {"witness": witness, "inner": inner, "b": b, "ratio": ratio}
    programs.backward_pass[(column_blocks, row_blocks)](
        grad=grad,
        **{name: grad if one is None else one for name, one in given.items()},
        scaled=scaled,
        **dict(zip(("parts_inner", "parts_b", "sums", "witnessed"), parts, strict=True)),
        tokens=tokens,
        out=out,
        rank=rank,
        **_strides(inner=inner, b=b),
        SCALE=scale,
        STEPS=steps,
        BM=sizes.rows,
        BN=sizes.columns,
        BR=padded(rank),
        THIN=inner is not None,
        RATIO=ratio is not None,
        SUMS=wants_sums,
        WITNESS=witness is not None,
        SCALED=wants_scaled,
        DOT=_dots(grad.dtype),
        ACC=accumulates(grad.dtype),
        PRECISION=_precision(),
        num_warps=sizes.warps,
    )
    blocks = [math.ceil(one.numel() / _ADDED) for one in into]
    starts = [sum(blocks[: place + 1]) for place in range(4)]
    if starts[-1]:
        jobs: dict[str, Any] = {}
        for letter, part, one, count, end in zip("abcd", parts, into, counts, starts, strict=True):
            job = {"parts": part, "into": one, "size": one.numel(), "count": count, "after": end}
            jobs |= {f"{name}_{letter}": value for name, value in job.items()}
        programs.add_up[(starts[-1],)](**jobs, BLOCK=_ADDED, ACC=accumulates(grad.dtype), num_warps=4)
    return found


def quotients(magnitude: Tensor, norm: Tensor, smallest: float) -> tuple[Tensor, Tensor] | None:
    """``c = m / n``, 0 where n is 0, with m held away from 0 by ``smallest``, and that m. None for what the program
    does not read."""
    if not (takes(magnitude, norm) and magnitude.is_contiguous() and norm.is_contiguous() and norm.numel()):
        return None
    found: tuple[Tensor, Tensor] = call(torch.ops.trimtab.quotients, _quotients, (magnitude, norm, smallest))
    return found


@on_its_device
def _quotients(magnitude: Tensor, norm: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    values, divisor = torch.empty_like(norm), torch.empty_like(norm)
    programs.quotients[(math.ceil(norm.numel() / _ADDED),)](
        magnitude=magnitude,
        norm=norm,
        values=values,
        divisor=divisor,
        size=norm.numel(),
        SMALLEST=smallest,
        BLOCK=_ADDED,
        num_warps=4,
    )
    return values, divisor


@on_its_device
def _squared_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    (out, features), rank, into = weight.shape, len(a), torch.empty_like(squares)
    sizes = norm_sizes(weight.itemsize)
    programs.squared_norms[(math.ceil(out / sizes.rows),)](
        weight=weight,
        squares=squares,
        a=a,
        b=b,
        crossed=a.mm(a.t()),
        into=into,
        out=out,
        features=features,
        rank=rank,
        **_strides(weight=weight, a=a, b=b),
        SCALE=scale,
        BM=sizes.rows,
        BN=sizes.columns,
        BR=padded(rank),
        DOT=_dots(weight.dtype),
        ACC=accumulates(squares.dtype),
        PRECISION=_precision(),
        num_warps=sizes.warps,
    )
    return into


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _backward_results(
    grad: Tensor,
    witness: Tensor | None,
    inner: Tensor | None,
    b: Tensor | None,
    scale: float,
    ratio: Tensor | None,
    wants_sums: bool,
    wants_scaled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where the results go: empty where one is not asked for."""
    (tokens, out), full = grad.shape, _full(grad.dtype)
    return (
        grad.new_empty((tokens, out) if wants_scaled else 0),
        grad.new_empty(out if wants_sums else 0, dtype=full),
        grad.new_empty(0 if witness is None else out, dtype=full),
        grad.new_empty(0 if inner is None else (tokens, inner.shape[1])),
        grad.new_empty(0, dtype=full) if b is None else torch.empty(b.shape, dtype=b.dtype, device=b.device),
    )


# For torch.compile, and for tensors without numbers, the passes are single operations.
_forward_op = torch.library.custom_op("trimtab::forward_pass", _forward_pass, mutates_args=("product", "output"))
_backward_op = torch.library.custom_op("trimtab::backward_pass", _backward_pass, mutates_args=())
_norms_op = torch.library.custom_op("trimtab::squared_norms", _squared_norms, mutates_args=())
_quotients_op = torch.library.custom_op("trimtab::quotients", _quotients, mutates_args=())
_quotients_op.register_fake(lambda magnitude, norm, smallest: (torch.empty_like(norm), torch.empty_like(norm)))
_norms_op.register_fake(lambda weight, squares, *given: torch.empty_like(squares))
_forward_op.register_fake(lambda *given: None)
_fold_op = torch.library.custom_op("trimtab::fold", _fold, mutates_args=())
_fold_op.register_fake(lambda weight, *given: torch.empty_like(weight))
_backward_op.register_fake(_backward_results)
