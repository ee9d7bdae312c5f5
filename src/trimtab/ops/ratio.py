"""The ratio of magnitude to norm, and how to multiply by it without losing its digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.decomposition import magnitude_over_norm
from trimtab.ops.stamp import is_fake

# Within this distance of 1, ``c - 1`` in half precision is a more exact multiplier than ``c`` itself, and ``y / c``
# is a safe way back to the product. Magnitudes stay near the norms they start from, so this is the ordinary case.
_NEAR_ONE = 0.5
HALF = (torch.bfloat16, torch.float16)

# What a magnitude of 0 is taken for where values are not looked at. Then ``y = c p`` still has the digits of p, and is
# zero for all that it is added to.
_SMALLEST = 2.0**-40


class Ratio(NamedTuple):
    """``c = m / n [out]``, 0 where the norm is 0."""

    values: Tensor
    """In the dtype of the norms, float32 or float64."""
    near_one: bool
    """Whether every value is known to lie near 1."""
    excess: Tensor | None
    """``c - 1`` in half precision, to multiply tensors of that dtype with, if they all lie near 1."""
    divisor: Tensor | None = None
    """``c n [out]``, which is the magnitude, for ``dm = sum dy y / (c n)``. None where c may be 0 or y lose its digits,
    so that the output is no witness of the product."""

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
            return torch.mul(values, factors, out=values if in_place else torch.empty_like(values))
        factors = factors.to(values.dtype)
        return values.mul_(factors) if in_place else values * factors


Quotients = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor] | None]


def ratio_of(magnitude: Tensor, norm: Tensor, dtype: torch.dtype, quotients: Quotients | None = None) -> Ratio:
    """``m / n`` for ``magnitude [out]`` and ``norm [out]``, to multiply tensors of ``dtype`` with; not
    differentiable. ``quotients`` computes it in one go where values are not looked at."""
    with torch.no_grad():
        magnitude = magnitude.detach().to(norm.dtype)
        if _may_be_read(norm):
            values = magnitude / norm
            excess = values - 1
            if float(torch.linalg.vector_norm(excess, float("inf"))) <= _NEAR_ONE:
                return Ratio(values, True, excess.to(dtype) if dtype in HALF else None, magnitude)
            return Ratio(magnitude_over_norm(magnitude, norm), False, None)
        if dtype == torch.float16:  # whose smallest number is too large
            return Ratio(magnitude_over_norm(magnitude, norm), False, None)
        if quotients is not None and (found := quotients(magnitude, norm, _SMALLEST)) is not None:
            return Ratio(found[0], False, None, found[1])
        divisor = magnitude.abs().clamp_min_(_SMALLEST).copysign_(magnitude)
        return Ratio(divisor / norm.masked_fill(norm == 0, float("inf")), False, None, divisor)


def _may_be_read(norm: Tensor) -> bool:
    """Whether values may be looked at. It would make an accelerator wait, and a compiler break its graph."""
    return norm.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(norm)
