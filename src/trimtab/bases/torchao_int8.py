"""torchao's int8 weight-only tensor inside an ``nn.Linear``: 8 bits a weight, a float32 scale for each row or group.

    W[o, i] = scale[o, i // group] * q[o, i]        q int8

The layer stays an ``nn.Linear``; what it holds is a tensor of another kind (``torchao.quantization.Int8Tensor``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import _quantised


class Base(_quantised.Quantised):
    """A linear layer whose weight is an ``Int8Tensor``, quantised symmetrically and with the batch left as it is."""

    @staticmethod
    def knows(module: nn.Module) -> bool:
        if type(module) is not nn.Linear:
            return False
        weight: Any = module.weight
        return (
            type(weight).__module__.startswith("torchao.")
            and type(weight).__name__ == "Int8Tensor"
            and weight.act_quant_kwargs is None
            and weight.act_pre_scale is None
        )

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        stored: Any = self.parameter
        all_scales = stored.scale.expand(self.shape[0], -1)  # one row of them, if there is one scale for all
        found = torch.empty(rows.stop - rows.start, self.shape[1], dtype=dtype, device=self.device)
        step = max(1, _quantised.BLOCK // max(1, self.shape[1]))
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            values, scales = stored.qdata[part].float(), all_scales[part]
            groups = values.unflatten(1, (scales.shape[1], -1))
            found[part.start - rows.start : part.stop - rows.start] = groups.mul_(scales.unsqueeze(2)).flatten(1)
        return found

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        self.module.weight = _parameter(weight.to(self.dtype))


def _parameter(weight: Tensor) -> nn.Parameter:
    from torchao.quantization import Int8Tensor, PerRow

    return nn.Parameter(Int8Tensor.from_hp(weight.contiguous(), PerRow()), requires_grad=False)


def quantised(weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    """A linear layer with ``weight [out, in]`` in ``dtype`` quantised row by row, and ``bias``. Needs torchao."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.bias = _parameter(weight.to(dtype)), bias  # type: ignore[assignment]
    return layer
