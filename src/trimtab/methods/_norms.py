"""What a method with a magnitude keeps of norms from one pass to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trimtab.bases import WeightBase
from trimtab.ops.decomposition import Axis
from trimtab.ops.ratio import Ratio
from trimtab.ops.stamp import Stamp


class SquaredNorms(NamedTuple):
    of: Stamp  # the frozen weight that they were computed from
    along: tuple[Axis, bool]  # the axis of the magnitude, and whether the weight is seen as it lies transposed
    values: Tensor


Mark = tuple[torch.dtype, torch.Size, int] | Tensor
"""By which the values of a tensor are known again."""


class KeptNorm(NamedTuple):
    marks: tuple[Mark, ...] | None  # None: no comparison is needed while the trained tensors are held
    squares: Tensor  # those of the frozen weight that the norm belongs to
    dtype: torch.dtype  # the one that the weight was read in, which of a quantised one is that of the input
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


def marks_of(tensors: Sequence[Tensor] | None) -> tuple[Mark, ...] | None:
    """What ``same_values`` holds ``tensors`` against; None for None."""
    return None if tensors is None else tuple(_mark(tensor) for tensor in tensors)


def _mark(tensor: Tensor) -> Mark:
    """On a processor a hash of every bit, which takes hardly longer than a comparison and no memory; elsewhere a copy,
    since there the values would have to come home first."""
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
        return tensor.detach().clone()
    # Of a copy that goes at once: memory that numpy has seen can never be given back, which sharding (FSDP2) does.
    numbers = tensor.detach().reshape(-1).view(torch.uint8).clone().numpy()
    return tensor.dtype, tensor.shape, hash(numbers.tobytes())


def same_values(marks: Sequence[Mark] | None, tensors: Sequence[Tensor] | None) -> bool:
    """Whether ``tensors`` still hold the values of which ``marks`` were taken; for None, which stands for tensors that
    are held, whether no marks were."""
    if marks is None or tensors is None:
        return marks is tensors
    return all(_fits(mark, tensor) for mark, tensor in zip(marks, tensors, strict=True))


def _fits(mark: Mark, tensor: Tensor) -> bool:
    if not isinstance(mark, Tensor):
        return tensor.device.type == "cpu" and tensor.dtype == mark[0] and mark == _mark(tensor)
    return mark.dtype == tensor.dtype and mark.device == tensor.device and torch.equal(mark, tensor)
