"""bitsandbytes' ``Linear8bitLt``: 8 bits a weight, one float32 scale a row (LLM.int8(), arXiv 2208.07339).

    W[o, i] = CB[o, i] * SCB[o] / 127        CB int8, SCB float32: the row's largest absolute value

Only the storage is bitsandbytes': the product is taken with the dequantised weight, in training and in inference. Its
own layer quantises the batch as well when it is evaluated, and so computes another function than in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import _quantised


class Base(_quantised.Quantised):
    """An int8 linear layer, before or after a forward pass of its own."""

    @staticmethod
    def knows(module: nn.Module) -> bool:
        # With has_fp16_weights the weight is a dense one that is trained: not what is meant here.
        return (
            _quantised.is_kind(module, "bitsandbytes.nn.modules", "Linear8bitLt") and module.weight.dtype == torch.int8
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight that was quantised, as far as it is on record; else the bias's, else float32."""
        said = getattr(self.module, "compute_dtype", None)
        return said or (torch.float32 if self.bias is None else self.bias.dtype)

    @property
    def _state(self) -> Any:
        return self.module.state

    @property
    def _scales(self) -> Tensor:
        # The layer's first forward pass moves them from the weight into its state.
        own = getattr(self.parameter, "SCB", None)
        largest: Tensor = self._state.SCB if own is None else own
        return (largest / 127).unsqueeze(1)

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        stored, scales = self.parameter.data[rows], self._scales[rows]
        found = torch.empty(stored.shape, dtype=dtype, device=stored.device)
        # Through float32 and rounded once, a few rows at a time: one pass over mixed dtypes takes two to three times
        # as long.
        step = max(1, _quantised.BLOCK // max(1, stored.shape[1]))
        for start in range(0, len(stored), step):
            part = slice(start, start + step)
            found[part] = stored[part].float().mul_(scales[part])
        return found

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        self.module.weight, self._state.CB, self._state.SCB = _parameter(weight), None, None


def _parameter(weight: Tensor) -> nn.Parameter:
    """``weight [out, in]`` quantised, a few rows at a time."""
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    stored = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    largest = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    step = max(1, _quantised.BLOCK // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        # It reads float16 only; a row of zeros would be divided by zero, and is 0 whatever its scale.
        rows = weight[part].to(torch.float16)
        stored[part], largest[part], _ = int8_vectorwise_quant(rows)
        stored[part].masked_fill_(largest[part].eq(0).unsqueeze(1), 0)
    return Int8Params(stored, requires_grad=False, has_fp16_weights=False, CB=stored, SCB=largest)


def quantised(weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    """An int8 layer with ``weight [out, in]`` and ``bias``, for ``dtype``. Needs bitsandbytes."""
    from trimtab.bases._bitsandbytes import Int8

    return Int8(dtype, _parameter(weight), bias)
