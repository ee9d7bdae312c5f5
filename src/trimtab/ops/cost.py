"""The two exact forms of an adapted product, and which of them is cheaper.

    folded      y = x (c (W + dV))^T          the weight is formed first: passes over [out, in], then one plain product
    factored    y = c (x W^T + x dV^T)        nothing [out, in] is formed: passes over [tokens, out]

(and the same for the gradient of the input). The products with W cost the same in both; what differs is how many
elements are passed over, so the choice follows from the shapes, and from what a pass costs on the device (`Passes`).

On a processor the passes are fitted to measurements: ``python benchmarks/layer.py --fit`` prints them anew. On
accelerators they are not measured. There they are the bytes that a pass moves, beside those of one in place that reads
and writes each element; a product with a factor of rank r costs one more such pass where its arithmetic takes as long,
``r = bytes * rate / bandwidth``, by the rates of one H200 (`_RATES`). On cards of other sizes the two go nearly
together: r is 300 to 400 in bfloat16 on an A100, an H100 and an RTX 4090.

A block that ``torch.compile`` compiles for batches of all sizes chooses once, for the size that is `expected`: a choice
by the size at hand would have it compiled once more for each outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Compute = Literal["auto", "folded", "factored"]


class Passes(NamedTuple):
    """What passes over one element cost on a device, in units of one in place."""

    output: float
    """Multiplying an output by the ratio, in place."""
    gradient: float
    """Multiplying a gradient by the ratio, into a new tensor."""
    weight: float
    """Multiplying a freshly formed weight by the ratio."""
    half_fold: float
    """Forming a weight in half precision, the arithmetic of its update not counted."""
    ranks: dict[int, float]
    """A product over so many features costs as much as one more pass over the elements that it adds to; by bytes of
    one."""
    half_ranks: float
    """The same while a weight in half precision is formed."""
    few: dict[int, int]
    """So few tokens are multiplied with an update in float32; by bytes of one element. On a processor a thin product in
    half precision takes some 20 us before it begins, ten times as much as one in float32."""


_RATES = {2: 790e12, 4: 60e12, 8: 34e12}
"""Operations a second by bytes of a number, and bytes a second from memory, of an H200."""
_BANDWIDTH = 4.0e12
_RANKS = {size: size * rate / _BANDWIDTH for size, rate in _RATES.items()}
_NEVER = {2: -1, 4: -1, 8: -1}

PROCESSOR = Passes(
    output=1.0,
    gradient=1.5,
    weight=0.6,
    half_fold=1.7,
    ranks={2: 120.0, 4: 20.0, 8: 10.0},
    half_ranks=20.0,
    few={2: 16, 4: -1, 8: -1},
)
FUSED = Passes(output=0.0, gradient=0.5, weight=0.0, half_fold=1.0, ranks=_RANKS, half_ranks=_RANKS[2], few=_NEVER)
"""Triton's kernels: the ratio is in the pass that adds the update, in the one that forms a weight, and of a gradient it
costs what is written."""
SEPARATE = Passes(output=1.0, gradient=1.0, weight=1.0, half_fold=5.0, ranks=_RANKS, half_ranks=_RANKS[4], few=_NEVER)
"""Torch's operations one after the other: a weight in half precision is widened (6 bytes an element), added to (8) and
rounded (6), where a pass in place takes 4."""
_KINDS = {"cpu": PROCESSOR, "meta": PROCESSOR, "cuda": FUSED, "xpu": FUSED}  # torch calls AMD's devices cuda, too


def passes_on(device: torch.device | str) -> Passes:
    """What passes cost on ``device``."""
    return _KINDS.get(device.split(":")[0] if isinstance(device, str) else device.type, SEPARATE)


_expected: int | None = None


@contextmanager
def expected(tokens: int) -> Iterator[None]:
    """A context in which compiled code chooses as for a batch of ``tokens``, whatever comes."""
    global _expected
    before, _expected = _expected, tokens
    try:
        yield
    finally:
        _expected = before


def counted(tokens: int) -> int:
    """The tokens to choose for, where a batch has ``tokens``."""
    return _expected if _expected is not None and torch.compiler.is_compiling() else tokens


def full_digits_for_few(tokens: int, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype in which ``tokens`` of ``dtype`` are multiplied with an update on ``device``."""
    return torch.float32 if tokens <= passes_on(device).few[dtype.itemsize] else dtype


class Work(NamedTuple):
    """What an update costs, in passes over one element."""

    product: float  # adding x dV^T to a product
    gradient: float  # adding grad dV to a gradient of the input
    fold: float  # forming W + dV


def may_fold_output(compute: Compute, dtype: torch.dtype) -> bool:
    """Whether the output may be computed in folded form, whatever that costs: in half precision only where the user
    says so, since the formed weight is rounded, and what an update adds below the last bit of a weight is lost."""
    return compute == "folded" or (compute == "auto" and dtype.itemsize >= 4)


def folds_output(
    compute: Compute, work: Work, tokens: int, shape: Sequence[int], *, scaled: bool, like: Tensor
) -> bool:
    """Whether the output is computed in folded form, in the dtype and on the device of ``like``."""
    if compute != "auto" or not may_fold_output(compute, like.dtype):
        return compute == "folded"
    passes = passes_on(like.device)
    return work.fold + scaled * passes.weight * shape[0] * shape[1] < (
        work.product + scaled * passes.output * tokens * shape[0]
    )


def folds_gradient(
    compute: Compute, work: Work, tokens: int, shape: Sequence[int], *, scaled: bool, like: Tensor
) -> bool:
    """Whether the gradient of the input is computed in folded form. (In half precision, too: it is rounded anyway.)"""
    if compute != "auto":
        return compute == "folded"
    passes = passes_on(like.device)
    elements = shape[0] * min(shape[1], tokens)  # multiplied is the weight or the gradient, whichever is smaller
    return (
        work.fold + scaled * passes.weight * shape[0] * shape[1] < work.gradient + scaled * passes.gradient * elements
    )
