"""``torch.nn.Linear`` in float32, bfloat16, float16 or float64: the weight is stored as ``[out, in]``.

Classes derived from it are taken, too, if they compute what it computes (``_probe``): Falcon's linear layers, the
output projection of ``nn.MultiheadAttention``, a user's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from trimtab.bases import _base
from trimtab.bases._probe import why_not_linear


class LinearBase(_base.WeightBase):
    """A dense linear layer."""

    @staticmethod
    def knows(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and not why_not_linear(module)

    @staticmethod
    def refuses(module: nn.Module) -> str:
        if isinstance(module, ParametrizationList):
            return "the weight of a parametrised layer is computed from it; remove the parametrisation first"
        return why_not_linear(module) if isinstance(module, nn.Linear) else ""

    @property
    def is_called(self) -> bool:
        return not isinstance(self.module, NonDynamicallyQuantizableLinear)

    def peft_place(self, name: str) -> str | None:
        holder, _, own = name.rpartition(".")
        return name if self.is_called else f"{holder}.base_layer.{own}"

    def in_layout(self, name: str, tensor: Tensor) -> Tensor:
        # PEFT (0.21) adds the update of an attention's output projection twice, in training, too: a fault, but one with
        # which its adapters are made and used. Half of it, added twice, is the same to the last digit.
        return tensor / 2 if name == "B" and not self.is_called else tensor

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        return tensor * 2 if name == "B" and not self.is_called else tensor

    def peft_partner(self, name: str) -> str | None:
        return None if self.is_called else name.rpartition(".")[0] + ".in_proj_weight"

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.parameter.shape
        return out_features, in_features

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.at_hand()

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight
