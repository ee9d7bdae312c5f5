"""The ratio of magnitude to norm, and how to multiply by it without losing its digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.decomposition import magnitude_over_norm

# Within this distance of 1, ``c - 1`` in half precision is a more exact multiplier than ``c`` itself, and ``y / c``
# is a safe way back to the product. Magnitudes stay near the norms they start from, so this is the ordinary case.
_NEAR_ONE = 0.5
HALF = (torch.bfloat16, torch.float16)


class Ratio(NamedTuple):
    """``c = m / n [out]``, 0 where the norm is 0."""

    values: Tensor
    """In the dtype of the norms, float32 or float64."""
    near_one: bool
    """Whether every value is known to lie near 1."""
    excess: Tensor | None
    """``c - 1`` in half precision, to multiply tensors of that dtype with, if they all lie near 1."""

    def times(self, values: Tensor, in_place: bool = False) -> Tensor:
        """``values [..., out] * c`` in the dtype of ``values``.

        A half-precision copy of ``c = 1 + e`` would lose ``e`` below 2^-9; ``v + v * e`` computed inside one kernel
        does not.
        """
        return self._times(values, self.values, self.excess, in_place)

    def times_rows(self, weight: Tensor, in_place: bool = False) -> Tensor:
        """``c * weight``, row by row of ``weight [out, in]``."""
        excess = None if self.excess is None else self.excess.unsqueeze(1)
        return self._times(weight, self.values.unsqueeze(1), excess, in_place)

    @staticmethod
    def _times(values: Tensor, factors: Tensor, excess: Tensor | None, in_place: bool) -> Tensor:
        if excess is not None and excess.dtype == values.dtype:
            return values.addcmul_(values, excess) if in_place else torch.addcmul(values, values, excess)
        if values.dtype in HALF:  # multiplied in the dtype of the factors, and rounded once
            return values.mul_(factors) if in_place else (values * factors).to(values.dtype)
        factors = factors.to(values.dtype)
        return values.mul_(factors) if in_place else values * factors


def ratio_of(magnitude: Tensor, norm: Tensor, dtype: torch.dtype) -> Ratio:
    """``m / n`` for ``magnitude [out]`` and ``norm [out]``, to multiply tensors of ``dtype`` with; not
    differentiable."""
    with torch.no_grad():
        # Reading the values would make an accelerator wait and a compiler break its graph, so there it stays unknown.
        if norm.device.type == "cpu" and not torch.compiler.is_compiling():
            values = magnitude.to(norm.dtype) / norm
            excess = values - 1
            if float(torch.linalg.vector_norm(excess, float("inf"))) <= _NEAR_ONE:
                return Ratio(values, True, excess.to(dtype) if dtype in HALF else None)
        return Ratio(magnitude_over_norm(magnitude.to(norm.dtype), norm), False, None)
