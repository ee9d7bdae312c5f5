"""What a method with a magnitude keeps of norms from one pass to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.ratio import Ratio
from trimtab.ops.stamp import Stamp


class SquaredNorms(NamedTuple):
    of: Stamp  # the frozen weight that they were computed from
    values: Tensor


class KeptNorm(NamedTuple):
    copies: tuple[Tensor, ...] | None  # None: no comparison is needed while the trained tensors are held
    squares: Tensor  # those of the frozen weight that the norm belongs to
    norm: Tensor
    ratios: dict[torch.dtype, Ratio]


def same_values(copies: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether ``tensors`` still hold the values that were copied (NaN is never the same)."""
    return all(
        copy.dtype == tensor.dtype and copy.device == tensor.device and torch.equal(copy, tensor)
        for copy, tensor in zip(copies, tensors, strict=True)
    )
