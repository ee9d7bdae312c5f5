"""Dropout that does not cost more than the product it stands before.

On a processor ``torch.nn.functional.dropout`` draws one random number per element, one after the other: measured on
1,000 x 576 values in bfloat16 it takes twice the time of the layer's whole matrix product. One 64-bit draw holds four
16-bit numbers, which decide four elements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero each element of ``x`` with ``probability`` (to the nearest 1/65,536) and scale the others, so that the
    mean stays.

    Reproducible from ``torch.manual_seed``; differentiable. Accelerators, which draw in parallel, use PyTorch's own.
    """
    threshold = min(round(probability * _LEVELS), _LEVELS - 1)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, probability)
    if threshold == 0:
        return x
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    levels = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over -32,768 to 32,767
    # Compared straight into the dtype of x: a mask of bools would have to be converted, at three times the cost.
    kept = torch.ge(levels, threshold - _LEVELS // 2, out=torch.empty_like(x, memory_format=torch.contiguous_format))
    return (x * kept).mul_(_LEVELS / (_LEVELS - threshold))  # not into the mask, which would round the factor
