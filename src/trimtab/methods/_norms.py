"""What a method with a magnitude keeps of norms from one pass to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.bases import WeightBase
from trimtab.ops.decomposition import Axis
from trimtab.ops.ratio import Ratio
from trimtab.ops.stamp import Stamp


class SquaredNorms(NamedTuple):
    of: Stamp  # the frozen weight that they were computed from
    along: tuple[Axis, bool]  # the axis of the magnitude, and whether the weight is seen as it lies transposed
    values: Tensor


class KeptNorm(NamedTuple):
    copies: tuple[Tensor, ...] | None  # None: no comparison is needed while the trained tensors are held
    squares: Tensor  # those of the frozen weight that the norm belongs to
    norm: Tensor
    ratios: dict[torch.dtype, Ratio]


def squares_of(
    base: WeightBase, kept: SquaredNorms | None, along: tuple[Axis, bool], dtype: torch.dtype, *, quickly: bool
) -> SquaredNorms:
    """``kept``, if they are what is asked for of the weight that ``base`` holds now; else computed anew."""
    fits = kept is not None and kept.along == along and kept.values.dtype == dtype
    if kept is not None and fits and kept.of.fits(base.stored(), quickly=quickly):
        return kept
    return SquaredNorms(Stamp(base.stored()), along, base.squared_norms(along[0]).to(dtype))


def same_values(copies: Sequence[Tensor] | None, tensors: Sequence[Tensor] | None) -> bool:
    """Whether ``tensors`` still hold the values that were copied (NaN is never the same); for None, which stands for
    tensors that are held, whether nothing was copied."""
    if copies is None or tensors is None:
        return copies is tensors
    return all(
        copy.dtype == tensor.dtype and copy.device == tensor.device and torch.equal(copy, tensor)
        for copy, tensor in zip(copies, tensors, strict=True)
    )
