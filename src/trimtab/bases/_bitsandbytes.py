"""bitsandbytes' two layers with our product in place of theirs. Imports bitsandbytes.

Their storage, their state dicts, their moves between devices; but the bare layer computes in training and in inference
what an adapted one computes at its start, and leaves its weight alone.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from trimtab.bases import _quantised, int8, nf4

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional package of kernels, and says so

import bitsandbytes as bnb  # noqa: E402


class Int8(bnb.nn.Linear8bitLt):
    """An int8 layer that multiplies with its dequantised weight."""

    def __init__(self, dtype: torch.dtype, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, has_fp16_weights=False, device="meta")
        self.compute_dtype = dtype
        self.weight, self.bias = weight, bias  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return _quantised.multiply(int8.Base(self), x)


class NF4(bnb.nn.Linear4bit):
    """A 4-bit layer that multiplies with its dequantised weight."""

    def __init__(self, dtype: torch.dtype, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        state = weight.quant_state  # type: ignore[attr-defined]
        out_features, in_features = state.shape
        super().__init__(
            in_features, out_features, bias=False, compute_dtype=dtype, quant_type=state.quant_type, device="meta"
        )
        self.weight, self.bias, self.quant_state = weight, bias, state  # type: ignore[assignment]
        weight.module = self  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return _quantised.multiply(nf4.Base(self), x)
