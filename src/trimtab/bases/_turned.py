"""A layer whose weight is ``W^T``, seen as one with the weight ``W``: a head that is tied to a look-up, where one
adapter serves both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.bases import _base
from trimtab.ops.decomposition import Axis


class TurnedBase(_base.WeightBase):
    """The weight of ``base`` the other way round. It is looked at, and never multiplied with."""

    def __init__(self, base: _base.WeightBase) -> None:
        super().__init__(base.module)
        self._base = base
        self.stored_transposed = not base.stored_transposed  # type: ignore[misc]

    @property
    def parameter(self) -> nn.Parameter:
        return self._base.parameter

    @property
    def stored_bias(self) -> None:
        return None

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self._base.shape
        return in_features, out_features

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._base.weight(dtype).t()

    def squared_norms(self, axis: Axis) -> Tensor:
        return self._base.squared_norms("input" if axis == "output" else "output")

    def as_stored(self, weight: Tensor) -> Tensor:
        return self._base.as_stored(weight.t())
