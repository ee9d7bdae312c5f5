"""A frozen product with an update and a ratio, for passes over a few tokens where nothing trains.

A model that writes runs each layer on one token: the arithmetic takes some microseconds, and finding out which
arithmetic it is takes longer. Where nobody wants a gradient and no trained tensor changes, that is found out once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.autocast import autocast_dtype
from trimtab.ops.frozen_linear import Update
from trimtab.ops.ratio import Ratio

TOKENS = 16
"""Most tokens of such a pass. So few make forming an effective weight dearer than multiplying by the update apart."""


@dataclass(frozen=True)
class Served:
    """``c * (x W^T + x dV^T) + bias``, operation by operation what ``frozen_linear`` does without gradients.

    Attributes:
        weight: frozen ``[out, in]``.
        bias: ``[out]``, or None.
        ratio: ``c [out]``; None for 1.
        update: how to multiply with ``dV``; None for none.
        tensors: the trained tensors of ``update``.
    """

    weight: Tensor
    bias: Tensor | None
    ratio: Ratio | None
    update: Update | None
    tensors: tuple[Tensor, ...]

    def takes(self, x: Tensor) -> bool:
        """Whether ``x [..., in]`` is for it: a few tokens, in the dtype of the weight, and no autocast."""
        weight = self.weight
        return x.dtype == weight.dtype and x.numel() <= TOKENS * weight.shape[1] and autocast_dtype(x) is None

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., out]`` for ``x [..., in]``."""
        rows = x.reshape(-1, x.shape[-1])
        product = F.linear(rows, self.weight, self.bias if self.ratio is None else None)
        if self.update is not None:
            self.update.add_product(product, rows, self.tensors)
        if self.ratio is not None:
            product = self.ratio.times(product, in_place=True)
            if self.bias is not None:
                product.add_(self.bias)
        return product.view(*x.shape[:-1], product.shape[-1])
