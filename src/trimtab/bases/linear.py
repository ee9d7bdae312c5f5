"""``torch.nn.Linear`` in float32, bfloat16, float16 or float64: the weight is stored as ``[out, in]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from trimtab.bases import _base


class LinearBase(_base.WeightBase):
    """A dense linear layer."""

    @staticmethod
    def knows(module: nn.Module) -> bool:
        # Only the class itself: one derived from it may multiply in its own way (quantised layers), or never be called
        # at all (the output projection inside nn.MultiheadAttention).
        return type(module) in (nn.Linear, NonDynamicallyQuantizableLinear) and _base.holds_plain_weight(module)

    @property
    def is_called(self) -> bool:
        return not isinstance(self.module, NonDynamicallyQuantizableLinear)

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.parameter.shape
        return out_features, in_features

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.parameter

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight
