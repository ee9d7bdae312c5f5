"""torchao's int8 weight-only tensor inside an ``nn.Linear``: 8 bits a weight, a float32 scale for each row or group.

    W[o, i] = scale[o, i // group] * q[o, i]        q int8

The layer stays an ``nn.Linear``; what it holds is a tensor of another kind (``torchao.quantization.Int8Tensor``). One
that is quantised here multiplies with its dequantised weight, as an adapted one does; torchao's own product multiplies
by the scales afterwards, and rounds once more on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import _quantised


class TorchaoInt8Base(_quantised.QuantisedBase):
    """A linear layer whose weight is an ``Int8Tensor``, quantised symmetrically and with the batch left as it is."""

    package = "torchao"
    extra = "torchao"
    bits = 8

    @staticmethod
    def knows(module: nn.Module) -> bool:
        if type(module) not in (nn.Linear, TorchaoInt8Linear):
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
        quantised, scales = stored.qdata[rows], stored.scale.expand(self.shape[0], -1)[rows]  # one scale may be for all
        dense = torch.empty(quantised.shape, dtype=dtype, device=self.device)
        for part in _quantised.row_blocks(*quantised.shape):
            groups = quantised[part].float().unflatten(1, (scales.shape[1], -1))
            dense[part] = groups.mul_(scales[part].unsqueeze(2)).flatten(1)
        return dense

    def stored(self) -> tuple[Tensor, ...]:
        stored: Any = self.parameter
        return stored.qdata, stored.scale

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        self.module.weight = _parameter(weight.to(self.dtype))

    @classmethod
    def quantised(cls, weight: Tensor, bias: nn.Parameter | Tensor | None, dtype: torch.dtype) -> nn.Module:
        layer: Any = TorchaoInt8Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight, layer.bias = _parameter(weight.to(dtype)), bias
        return layer  # type: ignore[no-any-return]

    @classmethod
    def describe(cls, model: Any, dtype: torch.dtype, left: list[str]) -> None:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig
        from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

        config = TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=left or None)
        model.config.quantization_config = config
        model.hf_quantizer = TorchAoHfQuantizer(config)  # it takes torchao's tensors apart for safetensors

    @classmethod
    def stored_bytes(cls, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return shape[0] * shape[1] + shape[0] * (4 + 1)  # a float32 scale and an int8 zero point for each row

    @classmethod
    def quantising_bytes(cls, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """torchao quantises all of a weight at once, with two copies of it in float32 on the way."""
        return 2 * 4 * shape[0] * shape[1]


class TorchaoInt8Linear(nn.Linear):
    """A linear layer that multiplies with its dequantised weight."""

    def forward(self, x: Tensor) -> Tensor:
        return TorchaoInt8Base(self).multiply(x)


def _parameter(weight: Tensor) -> nn.Parameter:
    from torchao.quantization import Int8Tensor, PerRow

    return nn.Parameter(Int8Tensor.from_hp(weight.contiguous(), PerRow()), requires_grad=False)
