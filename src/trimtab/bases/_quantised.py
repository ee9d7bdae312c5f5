"""What the quantised kinds of frozen weight share.

A quantised weight is dequantised for a product and dropped after it: once in a forward pass, once in the backward
pass, and what is kept in between is the quantised form alone. Norms are read a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.bases import _base
from trimtab.ops import decomposition
from trimtab.ops.autocast import autocast_dtype
from trimtab.ops.decomposition import Axis
from trimtab.ops.frozen_linear import frozen_linear

BLOCK = 1 << 17
"""Elements that are dequantised at a time where not all are needed at once: what a second cache holds in float32."""


class QuantisedBase(_base.WeightBase):
    """A linear layer ``[out, in]`` whose weight is stored in fewer bits. It multiplies in the dtype of its input.

    A file of such a kind says how to read rows, how to quantise, what transformers is told of it, and what it weighs.
    """

    stored_dense: ClassVar[bool] = False

    package: ClassVar[str]
    """The Python package that quantising needs."""
    extra: ClassVar[str]
    """The extra of trimtab that installs it."""
    bits: ClassVar[int]
    """Bits of one weight, scales not counted."""

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The dequantised ``rows`` of the weight, a new tensor in ``dtype``."""
        raise NotImplementedError

    @classmethod
    def quantised(cls, weight: Tensor, bias: nn.Parameter | Tensor | None, dtype: torch.dtype) -> nn.Module:
        """A layer of this kind with ``weight [out, in]``, rounded to ``dtype`` and then quantised, and ``bias``. Needs
        ``package``."""
        raise NotImplementedError

    @classmethod
    def describe(cls, model: Any, dtype: torch.dtype, left: list[str]) -> None:
        """Note at a transformers model how its layers are quantised, all but those called ``left``, so that it can be
        saved and loaded again. Raises ModelError where the kind cannot."""
        raise NotImplementedError

    @classmethod
    def stored_bytes(cls, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes that a weight of ``shape``, quantised from ``dtype``, takes."""
        raise NotImplementedError

    @classmethod
    def quantising_bytes(cls, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes that quantising such a weight takes for the moment, beside the dense and the quantised one: by default
        a few blocks in float32."""
        return 32 * min(BLOCK, shape[0] * shape[1])

    @property
    def step(self) -> int:
        """A slice of rows must begin at a multiple of this."""
        return 1

    def blocks(self) -> list[slice]:
        """Slices of rows that hold about ``BLOCK`` elements each."""
        out_features, in_features = self.shape
        return row_blocks(out_features, in_features, self.step)

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

    def multiply(self, x: Tensor) -> Tensor:
        # The layer's own forward pass may compute something else than the product with the dequantised weight.
        dtype = self.dtype_for(x)
        return frozen_linear(x, self.weight(dtype), self.bias, through=self.through, again=self.again(dtype))


def row_blocks(out_features: int, in_features: int, step: int = 1) -> list[slice]:
    """Slices that cut rows of ``in_features`` into blocks of about ``BLOCK`` elements, each beginning at a multiple of
    ``step``."""
    rows = max(1, BLOCK // max(1, in_features * step)) * step
    return [slice(start, min(start + rows, out_features)) for start in range(0, out_features, rows)]


def aligned_rows(in_features: int, block: int) -> int:
    """The smallest number of rows of ``in_features`` that fills whole blocks of ``block`` elements."""
    return block // math.gcd(in_features, block)
