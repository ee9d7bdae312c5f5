"""A frozen product with an update and a ratio, for passes over a few tokens where nothing trains.

A model that writes runs each layer on one token: the arithmetic takes some microseconds, and finding out which
arithmetic it is takes longer. Where nobody wants a gradient and no trained tensor changes, that is found out once.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.autocast import autocast_dtype
from trimtab.ops.frozen_linear import Update
from trimtab.ops.ratio import Ratio

TOKENS = 16
"""Most tokens of such a pass. So few make forming an effective weight dearer than multiplying by the update apart."""


class Served:
    """``c * (x W^T + x dV^T) + bias``, operation by operation what ``frozen_linear`` does without gradients.

    Args:
        weight: frozen ``[out, in]``.
        bias: ``[out]``, or None.
        ratio: ``c [out]``; None for 1.
        update: how to multiply with ``dV``; None for none.
        tensors: the trained tensors of ``update``.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        ratio: Ratio | None,
        update: Update | None,
        tensors: tuple[Tensor, ...],
    ) -> None:
        self._weight, self._ratio, self._update, self._tensors = weight, ratio, update, tensors
        self._dtype, (self._out, self._in) = weight.dtype, weight.shape
        # Without a ratio the bias goes into the product, exactly as the bare layer does it.
        self._bias = bias if ratio is None else None
        self._bias_after = None if ratio is None else bias

    def takes(self, x: Tensor) -> bool:
        """Whether ``x [..., in]`` is for it: a few tokens, in the dtype of the weight, and no autocast."""
        return x.dtype is self._dtype and x.numel() <= TOKENS * self._in and autocast_dtype(x) is None

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., out]`` for ``x [..., in]``."""
        rows = x.reshape(-1, self._in)
        product = F.linear(rows, self._weight, self._bias)
        if self._update is not None:
            self._update.add_product(product, rows, self._tensors)
        if self._ratio is not None:
            product = self._ratio.times(product, True)
            if self._bias_after is not None:
                product.add_(self._bias_after)
        return product.view(*x.shape[:-1], self._out)
