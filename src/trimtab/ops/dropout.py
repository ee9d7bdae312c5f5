"""Dropout that does not cost more than the product it stands before.

On a processor ``torch.nn.functional.dropout`` draws one random number per element, one after the other: measured on
1,000 x 576 values in bfloat16 it takes twice the time of the layer's whole matrix product. One 64-bit draw holds four
16-bit numbers, or eight of 8 bits where these are fine enough, and each decides one element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Keep(NamedTuple):
    """What dropout keeps of a tensor ``x``: ``scale * mask * x``. The factor stands apart, since a mask in half
    precision would round it."""

    mask: Tensor
    """1 where an element is kept, else 0; shape and dtype of ``x``."""
    scale: float

    def of(self, x: Tensor) -> Tensor:
        """``scale * mask * x``, a new tensor, rounded once."""
        return torch.addcmul(x.new_zeros(()), x, self.mask, value=self.scale)


def draw_keep(x: Tensor, probability: float) -> Keep | None:
    """Draw which elements of ``x`` are kept; each is dropped with ``probability``, to the nearest 1/65,536. None where
    that is 0.

    Reproducible from ``torch.manual_seed``.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # accelerators draw in parallel
        drawn = torch.rand_like(x, dtype=torch.float32, requires_grad=False)
        return Keep((drawn >= probability).to(x.dtype), 1 / (1 - probability))
    few = (probability * 256).is_integer()
    levels, kind = (256, torch.int8) if few else (65536, torch.int16)
    threshold = min(round(probability * levels), levels - 1)
    if threshold == 0:
        return None
    draws = torch.empty(-(-x.numel() * kind.itemsize // 8), dtype=torch.int64).random_(-(2**63), None)
    drawn = draws.view(kind)[: x.numel()].view(x.shape)  # uniform over all that the type holds
    # Compared straight into the dtype of x: a mask of bools would have to be converted, at three times the cost.
    mask = torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=False)
    return Keep(torch.ge(drawn, threshold - levels // 2, out=mask), levels / (levels - threshold))


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero each element of ``x`` with ``probability`` and scale the others, so that the mean stays. Differentiable."""
    keep = draw_keep(x, probability)
    return x if keep is None else keep.of(x)
