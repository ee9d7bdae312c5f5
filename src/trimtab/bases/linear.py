"""``torch.nn.Linear`` in float32, bfloat16, float16 or float64: the weight is stored as ``[out, in]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.bases import _base

DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Base(_base.Base):
    """A dense linear layer."""

    @staticmethod
    def knows(module: nn.Module) -> bool:
        # Subclasses may multiply in their own way (quantised layers), or never be called at all (the output
        # projection inside nn.MultiheadAttention): only the class itself is known. A tensor subclass as weight
        # likewise.
        return (
            type(module) is nn.Linear
            and type(module.weight) is nn.Parameter
            and type(module.weight.data) is Tensor
            and module.weight.dtype in DENSE
        )

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.parameter.shape
        return out_features, in_features

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.parameter

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight
