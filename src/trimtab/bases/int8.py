"""bitsandbytes' ``Linear8bitLt``: 8 bits a weight, one float32 scale a row (LLM.int8(), arXiv 2208.07339).

    W[o, i] = CB[o, i] * SCB[o] / 127        CB int8, SCB float32: the row's largest absolute value

Only the storage is bitsandbytes': the product is taken with the dequantised weight, in training and in inference. Its
own layer quantises the batch as well when it is evaluated, and so computes another function than in training.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import _base, _quantised


class Int8Base(_quantised.QuantisedBase):
    """An int8 linear layer, before or after a forward pass of its own."""

    package = "bitsandbytes"
    extra = "quantised"
    bits = 8

    @staticmethod
    def knows(module: nn.Module) -> bool:
        if not _base.is_instance_by_name(module, "bitsandbytes.nn.modules", "Linear8bitLt"):
            return False
        return module.weight.dtype == torch.int8  # with has_fp16_weights it is a dense one that is trained

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight that was quantised, as far as it is on record; else the bias's, else float32."""
        recorded = getattr(self.module, "compute_dtype", None)
        return recorded or (torch.float32 if self.bias is None else self.bias.dtype)

    @property
    def _state(self) -> Any:
        return self.module.state

    @property
    def _largest(self) -> Tensor:
        # The layer's first forward pass moves them from the weight into its state.
        holder: Any = self.parameter if getattr(self.parameter, "SCB", None) is not None else self._state
        # ``module.to(device)`` moves a parameter's numbers and leaves what hangs on it behind: it follows here.
        if holder.SCB.device != self.parameter.device and not self.parameter.is_meta:
            holder.SCB = holder.SCB.to(self.parameter.device)
        if getattr(holder, "CB", None) is not None and holder.CB.device != self.parameter.device:
            holder.CB = self.parameter.data
        largest: Tensor = holder.SCB
        return largest

    def stored(self) -> tuple[Tensor, ...]:
        return self.parameter, self._largest

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        stored, scales = self.parameter.data[rows], (self._largest[rows] / 127).unsqueeze(1)
        dense = torch.empty(stored.shape, dtype=dtype, device=stored.device)
        # Through float32 and rounded once, a few rows at a time: one pass over mixed dtypes takes two to three times
        # as long.
        for part in _quantised.row_blocks(*stored.shape):
            dense[part] = stored[part].float().mul_(scales[part])
        return dense

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        self.module.weight, self._state.CB, self._state.SCB = _parameter(weight), None, None

    @classmethod
    def quantised(cls, weight: Tensor, bias: nn.Parameter | Tensor | None, dtype: torch.dtype) -> nn.Module:
        layer: nn.Module = _layer_class()(dtype, _parameter(weight), bias)
        return layer

    @classmethod
    def describe(cls, model: Any, dtype: torch.dtype, left: list[str]) -> None:
        from transformers import BitsAndBytesConfig

        model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left or None)

    @classmethod
    def stored_bytes(cls, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return shape[0] * shape[1] + 4 * shape[0]


def _parameter(weight: Tensor) -> nn.Parameter:
    """``weight [out, in]`` quantised, a few rows at a time."""
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    stored = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    largest = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for part in _quantised.row_blocks(*weight.shape):
        # It reads float16 only; a row of zeros would be divided by zero, and is 0 whatever its scale.
        rows = weight[part].to(torch.float16)
        stored[part], largest[part], _ = int8_vectorwise_quant(rows)
        stored[part].masked_fill_(largest[part].eq(0).unsqueeze(1), 0)
    parameter: nn.Parameter = Int8Params(stored, requires_grad=False, has_fp16_weights=False, CB=stored, SCB=largest)
    return parameter


@cache
def _layer_class() -> Any:
    from bitsandbytes.nn import Linear8bitLt

    class Int8Linear(Linear8bitLt):
        """bitsandbytes' int8 layer, which here multiplies with its dequantised weight."""

        __qualname__ = "Int8Linear"

        def __init__(self, dtype: torch.dtype, weight: nn.Parameter, bias: Tensor | None) -> None:
            out_features, in_features = weight.shape
            super().__init__(in_features, out_features, bias=False, has_fp16_weights=False, device="meta")
            self.compute_dtype = dtype
            self.weight, self.bias = weight, bias  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return Int8Base(self).multiply(x)

    return Int8Linear


def __getattr__(name: str) -> Any:
    """``Int8Linear`` is made when it is first asked for (by ``quantised``, or by pickle): to derive from bitsandbytes'
    layer takes bitsandbytes."""
    if name == "Int8Linear":
        return _layer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
