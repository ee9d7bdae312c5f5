"""transformers' ``Conv1D``, the linear layer of GPT-2: the weight is stored transposed, as ``[in, out]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.bases import _base


class Conv1DBase(_base.WeightBase):
    """A dense linear layer stored the other way round."""

    stored_transposed = True

    @staticmethod
    def knows(module: nn.Module) -> bool:
        # Asked by name: a model without such a layer need not import transformers.
        kind = type(module)
        is_conv1d = (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
        return is_conv1d and _base.holds_plain_weight(module)

    @property
    def shape(self) -> tuple[int, int]:
        in_features, out_features = self.parameter.shape
        return out_features, in_features

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.at_hand().t()

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.t()
