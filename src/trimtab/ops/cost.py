"""The two exact forms of an adapted product, and which of them is cheaper.

    folded      y = x (c (W + dV))^T          the weight is formed first: passes over [out, in], then one plain product
    factored    y = c (x W^T + x dV^T)        nothing [out, in] is formed: passes over [tokens, out]

(and the same for the gradient of the input). The products with W cost the same in both; what differs is how many
elements are passed over, so the choice follows from the shapes. The weights below are passes over one element, in
units of one in-place pass, fitted to measurements: ``python benchmarks/layer.py --fit`` prints them anew.

A block that ``torch.compile`` compiles for batches of all sizes chooses once, for the size that is `expected`: a choice
by the size at hand would have it compiled once more for each outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

Compute = Literal["auto", "folded", "factored"]

# Multiplying by the ratio: an output in place, a gradient into a new tensor, a freshly formed weight in place.
RATIO_OUTPUT = 1.0
RATIO_GRADIENT = 1.5
RATIO_WEIGHT = 0.6
# A product over so many features costs as much as one more pass over the elements that it adds to; by bytes of one.
RANKS_PER_PASS = {2: 120.0, 4: 20.0, 8: 10.0}

# So few tokens are multiplied with an update in float32: a thin product in half precision costs some 20 us before it
# begins, ten times as much as one in float32. By bytes of one element.
FEW = {2: 16, 4: -1, 8: -1}

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


def full_digits_for_few(tokens: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ``tokens`` of ``dtype`` are multiplied with an update."""
    return torch.float32 if tokens <= FEW[dtype.itemsize] else dtype


class Work(NamedTuple):
    """What an update costs, in passes over one element."""

    product: float  # adding x dV^T to a product
    gradient: float  # adding grad dV to a gradient of the input
    fold: float  # forming W + dV


def folds_output(
    compute: Compute, work: Work, tokens: int, shape: Sequence[int], *, scaled: bool, dtype: torch.dtype
) -> bool:
    """Whether the output is computed in folded form.

    In half precision only where the user says so: the formed weight is rounded, and what an update adds below the last
    bit of a weight is lost.
    """
    if compute != "auto":
        return compute == "folded"
    if dtype.itemsize < 4:
        return False
    return work.fold + scaled * RATIO_WEIGHT * shape[0] * shape[1] < (
        work.product + scaled * RATIO_OUTPUT * tokens * shape[0]
    )


def folds_gradient(compute: Compute, work: Work, tokens: int, shape: Sequence[int], *, scaled: bool) -> bool:
    """Whether the gradient of the input is computed in folded form. (In half precision, too: it is rounded anyway.)"""
    if compute != "auto":
        return compute == "folded"
    elements = shape[0] * min(shape[1], tokens)  # multiplied is the weight or the gradient, whichever is smaller
    return work.fold + scaled * RATIO_WEIGHT * shape[0] * shape[1] < work.gradient + scaled * RATIO_GRADIENT * elements
