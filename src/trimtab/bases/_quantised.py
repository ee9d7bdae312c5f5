"""What the quantised kinds of frozen weight share.

A quantised weight is dequantised for a product and dropped after it: once in a forward pass, once in the backward
pass, and what is kept in between is the quantised form alone. Norms are read a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from trimtab.bases import _base
from trimtab.ops import decomposition
from trimtab.ops.autocast import autocast_dtype
from trimtab.ops.decomposition import Axis
from trimtab.ops.frozen_linear import frozen_linear

BLOCK = 1 << 17
"""Elements that are dequantised at a time where not all are needed at once: what a second cache holds in float32."""


class Quantised(_base.Base):
    """A linear layer ``[out, in]`` whose weight is stored in fewer bits. It multiplies in the dtype of its input."""

    stored_dense: ClassVar[bool] = False

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The dequantised ``rows`` of the weight, a new tensor in ``dtype``."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        """A slice of rows must begin at a multiple of this."""
        return 1

    def blocks(self) -> list[slice]:
        """Slices of rows that hold about ``BLOCK`` elements each."""
        out_features, in_features = self.shape
        rows = max(1, BLOCK // (in_features * self.step)) * self.step
        return [slice(start, min(start + rows, out_features)) for start in range(0, out_features, rows)]

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features  # type: ignore[return-value]

    @torch.no_grad()
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.rows(slice(0, self.shape[0]), dtype or self.dtype)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight

    def again(self, dtype: torch.dtype) -> Callable[[], Tensor] | None:
        return partial(self.weight, dtype)

    def dtype_for(self, x: Tensor) -> torch.dtype:
        return autocast_dtype(x) or x.dtype

    @torch.no_grad()
    def squared_norms(self, axis: Axis) -> Tensor:
        parts = (decomposition.squared_norms(self.rows(block, self.dtype), axis) for block in self.blocks())
        if axis == "output":
            return torch.cat(list(parts))
        total = torch.zeros(self.shape[1], dtype=torch.float64, device=self.device)
        for part in parts:
            total += part
        return total

    @torch.no_grad()
    def as_dense(self, dtype: torch.dtype) -> nn.Module:
        out_features, in_features = self.shape
        dense = nn.Linear(in_features, out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.weight(self.dtype).to(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(dtype), requires_grad=self.bias.requires_grad)
        return dense.train(self.module.training)

    def untie(self) -> None:
        """Nothing to do: ``write`` gives the module a weight of its own."""


def multiply(base: _base.Base, x: Tensor) -> Tensor:
    """``x W^T + bias`` for the bare layer, as an adapted one computes it at its start."""
    dtype = base.dtype_for(x)
    return frozen_linear(x, base.weight(dtype), base.bias, again=base.again(dtype))


def is_kind(module: nn.Module, place: str, name: str) -> bool:
    """Whether ``module`` is of the class ``name`` of the Python module ``place``, or of one derived from it.

    Asked by name: a model without such a layer need not import its package.
    """
    return any((kind.__module__, kind.__name__) == (place, name) for kind in type(module).__mro__)


def aligned_rows(in_features: int, block: int) -> int:
    """The smallest number of rows of ``in_features`` that fills whole blocks of ``block`` elements."""
    return block // math.gcd(in_features, block)
