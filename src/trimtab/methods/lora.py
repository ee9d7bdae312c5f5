"""LoRA: a low-rank product beside the frozen weight (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    W' = W + s B A        A [rank, in] drawn at random, B [out, rank] zero, s = alpha / rank

With ``rank_stabilised`` the scale is ``s = alpha / sqrt(rank)`` (arXiv 2312.03732). With ``magnitude`` the sum is
normalised row by row and multiplied by a trained magnitude: that is DoRA. ``rank: 0`` with a magnitude trains the
magnitude alone (DoRA, Table 6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from trimtab.bases import WeightBase
from trimtab.errors import PlanError, SurgeryError
from trimtab.methods import _weight
from trimtab.methods._method import TRAINING_ONLY, RateGroup
from trimtab.ops import across_groups, low_rank
from trimtab.ops.across_groups import AcrossGroups
from trimtab.ops.update import Update


class Options(_weight.WeightOptions):
    """What LoRA can be told."""

    rank: int = Field(8, ge=0, description="Rank of the update: higher learns more and costs more. 0: magnitude alone.")
    alpha: float | None = Field(None, gt=0, description="Numerator of the scale. Default: twice the rank.")
    rank_stabilised: bool = Field(False, description="Scale by alpha / sqrt(rank) in place of alpha / rank.")
    across_groups: bool = Field(
        False,
        description="On a convolution with groups: an update that reads the channels of all groups, as PEFT's does. It "
        "cannot be merged. Without, each group's update reads its own channels.",
    )
    init: Annotated[Literal["kaiming", "gaussian"], TRAINING_ONLY] = Field(
        "kaiming",
        description="How A is drawn: Kaiming-uniform with a = sqrt(5) (the ecosystem's), or normal (the paper's). On "
        "a look-up it is B that is drawn, standard normal as in the ecosystem, and A is zero.",
    )
    init_std: Annotated[float | None, TRAINING_ONLY] = Field(
        None, gt=0, description="Standard deviation of the gaussian draw. Default: 1 / rank. 1: standard normal."
    )
    added_bias: bool = Field(
        False,
        description="With bias: a layer that has none gets one, as from PEFT's lora_bias. It then cannot be merged.",
    )

    @model_validator(mode="after")
    def _something_to_train(self) -> Options:
        if self.rank == 0 and not self.magnitude:
            raise ValueError("rank: 0 leaves nothing to train; give a rank of at least 1, or set magnitude: true")
        if self.init_std is not None and self.init != "gaussian":
            raise ValueError("init_std belongs to init: gaussian")
        return self

    @property
    def scale(self) -> float:
        """``s``: what ``B A`` is multiplied by."""
        if self.rank == 0:
            return 0.0
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rank_stabilised else alpha / self.rank

    def computes(self) -> dict[str, Any]:
        """As for any method, with the scale itself in place of the two options that it follows from."""
        settings = {**super().computes(), "scale": self.scale}
        return {key: settings[key] for key in settings if key not in ("alpha", "rank_stabilised")}


class LoRA(_weight.WeightMethod):
    """``A [rank, in]`` and ``B [out, rank]``, for each weight of a stack. A rank above the matrix's is taken: it is
    wasteful, and stored adapters have it."""

    options_type = Options
    options: Options
    rate_groups: Mapping[str, RateGroup] = {**_weight.WeightMethod.rate_groups, "B": "second factor"}

    def __init__(self, base: WeightBase, options: Options) -> None:
        super().__init__(base, options)
        self.groups = base.groups if options.across_groups and options.rank else 1
        if self.groups > 1:
            self._check_groups()
        if options.rank:
            place: dict[str, Any] = {"dtype": self.dtype, "device": base.device}
            groups = self.groups
            self.A = nn.Parameter(torch.zeros(*base.stack, options.rank, groups * self.in_features, **place))
            self.B = nn.Parameter(torch.zeros(*base.stack, self.out_features, options.rank // groups, **place))
            self._drawn = "B" if base.first_factor_zero else "A"
            self.start(self._drawn, getattr(self, self._drawn).detach())
        if options.bias and options.added_bias and self.bias is None and base.is_called:
            self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=self.dtype, device=base.device))
        if base.first_factor_zero:
            self.rate_groups = {**_weight.WeightMethod.rate_groups, "A": "second factor"}

    def start(self, name: str, tensor: Tensor) -> None:
        if name != self._drawn:
            super().start(name, tensor)
            return
        for factor in tensor.view(-1, *tensor.shape[-2:]):
            if self.options.init == "gaussian":
                nn.init.normal_(factor, std=self.options.init_std or 1 / self.options.rank)
            elif name == "B":
                nn.init.normal_(factor)
            else:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def _check_groups(self) -> None:
        """Raise PlanError for what an update across groups cannot do."""
        options = self.options
        if options.rank % self.groups:
            raise PlanError(f"rank {options.rank} cannot be divided among {self.groups} groups (across_groups: true)")
        if options.compute == "folded" or (options.magnitude and options.magnitude_axis == "input"):
            raise PlanError("across_groups: true has no weight to be folded into, nor columns for magnitudes")

    @classmethod
    def fitted(cls, options: Options, shape: tuple[int, int]) -> Options:
        """As for any method; the scale stays."""
        rank = min(options.rank, *shape)
        alpha = options.scale * (math.sqrt(rank) if options.rank_stabilised else rank)
        return options if rank == options.rank else options.model_copy(update={"rank": rank, "alpha": alpha})

    @property
    def scale(self) -> float:
        """``s``: what ``B A`` is multiplied by."""
        return self.options.scale

    def factors(self) -> tuple[Update | None, tuple[Tensor, ...]]:
        if not self.options.rank:
            return None, ()
        if self.groups > 1:
            return AcrossGroups(self.scale, self.groups), (self.A, self.B)
        return low_rank.LowRank(self.scale), (self.A, self.B)

    def turned_factors(self) -> tuple[Update | None, tuple[Tensor, ...]]:
        update, tensors = self.factors()
        return update, tuple(tensor.t() for tensor in reversed(tensors))  # (B A)^T = A^T B^T

    def total(self, weight: Tensor) -> Tensor:
        if self.groups > 1:
            raise SurgeryError(
                f"an update across the {self.groups} groups of a convolution (PEFT's) fits into no kernel of the "
                "layer's own shape. Keep the adapter beside the model, or train one with across_groups: false"
            )
        return super().total(weight)

    def squared_norms(self, weight: Tensor, squares: Tensor) -> Tensor:
        if not self.options.rank:
            return squares
        scale, axis = self.scale, self.options.magnitude_axis
        if self.groups > 1:
            return across_groups.squared_norms(weight, squares, self.A, self.B, scale)
        return low_rank.squared_norms(weight, squares, self.held(self.A), self.B, scale=scale, axis=axis)
