"""A frozen product with an update and a ratio, for passes over a few tokens where nothing trains.

A model that generates text runs each layer on one token: the arithmetic takes some microseconds, and deciding which
arithmetic to do takes longer. Where nobody wants a gradient and no trained tensor changes, that is decided once.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trimtab.ops.autocast import autocast_dtype
from trimtab.ops.frozen_linear import Operands, factored
from trimtab.ops.stamp import version_of

TOKENS = 16
"""The most tokens of such a pass. For so few, forming an effective weight costs more than a product with the update."""


class FewTokensLinear:
    """``c * (x W^T + x dV^T) + bias``, as ``frozen_linear`` does it without gradients, for a plain matrix W.

    Args:
        operands: what rows are multiplied with.
        layer: the layer's own parameters by name, ``weight`` among them, of which the operands were made.
    """

    def __init__(self, operands: Operands, layer: Mapping[str, Tensor | None]) -> None:
        self._operands, self._dtype = operands, operands.weight.dtype
        self._out, self._in = operands.weight.shape
        self._layer, self._weight, self._bias = layer, layer["weight"], layer.get("bias")
        self._version = version_of(operands.weight)

    @property
    def is_true(self) -> bool:
        """Whether the layer still has the weight and the bias that this was made of, and nobody has written to the
        weight."""
        weight, layer = self._weight, self._layer
        same = layer.get("weight") is weight and layer.get("bias") is self._bias
        return same and weight is not None and version_of(weight) == self._version

    def takes(self, x: Tensor) -> bool:
        """Whether ``x [..., in]`` is for it: a few tokens, in the dtype of the weight, and no autocast."""
        return x.dtype is self._dtype and x.numel() <= TOKENS * self._in and autocast_dtype(x) is None

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., out]`` for ``x [..., in]``."""
        rows = x.reshape(-1, self._in)
        return factored(rows, rows, self._operands, in_place=True).output.view(*x.shape[:-1], self._out)
