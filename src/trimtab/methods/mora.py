"""MoRA: a square matrix in place of two thin ones (Jiang et al. 2024, arXiv 2405.12130, section 4).

    W' = W + spread . M . compress        M [k, k] zero at the start, k = floor(sqrt((in + out) * rank) + 0.5)

It costs what LoRA of the same rank costs, and its update can have rank k. ``form: rotation`` (equation 9, the
authors' type 6) turns each chunk of the input by the rotary angles of its position, ``form: sharing`` (equation 6,
type 1) adds the chunks up as they are; the authors use rotation at low ranks and sharing at high ones. There is no
scale. The maps are in ``trimtab.ops.square``; unlike the authors' code, every input is used where there are more
chunks than output blocks, and the input's end is filled with zeros, not with its beginning.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.bases import WeightBase
from trimtab.errors import PlanError
from trimtab.methods import _weight
from trimtab.ops.square import Square
from trimtab.ops.update import Update, WithoutColumn


class Options(_weight.WeightOptions):
    """What MoRA can be told."""

    rank: int = Field(8, ge=1, description="The LoRA rank whose number of parameters the square matrix matches.")
    form: Literal["rotation", "sharing"] = Field(
        "rotation",
        description="rotation: chunks of the input are told apart by rotary angles; sharing: they are added up.",
    )


def side(out_features: int, in_features: int, options: Options) -> int:
    """``k``, the side of the square matrix; even for the rotation form, which turns pairs of features."""
    k = math.floor(math.sqrt((in_features + out_features) * options.rank) + 0.5)
    return k - k % 2 if options.form == "rotation" else k


class MoRA(_weight.WeightMethod):
    """``M [k, k]``, for each weight of a stack. Raises PlanError if k is larger than both sides of the weight, or less
    than 2 for rotation."""

    options_type = Options
    options: Options
    can_refit = False  # M stands in places of dV that follow from the size of the weight

    def __init__(self, base: WeightBase, options: Options) -> None:
        self.require_fit(options, base.shape)
        out_features, in_features = base.shape
        k = side(out_features, in_features, options)
        if k < 2:
            raise PlanError(
                f"a weight of {out_features} x {in_features} at rank {options.rank} leaves a square of side "
                f"{k}, and the "
                "rotation form turns pairs of features; raise the rank or use form: sharing"
            )
        super().__init__(base, options)
        self.square = Square(in_features, out_features, k, turn=options.form == "rotation")
        self.M = nn.Parameter(torch.zeros(*base.stack, k, k, dtype=self.dtype, device=base.device))

    @classmethod
    def fitted(cls, options: Options, shape: tuple[int, int]) -> Options:
        for rank in range(min(options.rank, *shape), 1, -1):
            fitting = options.model_copy(update={"rank": rank})
            if side(*shape, fitting) <= max(shape):
                break
        else:
            fitting = options.model_copy(update={"rank": 1})
        return options if fitting.rank == options.rank else fitting

    @classmethod
    def require_fit(cls, options: Options, shape: tuple[int, int]) -> None:
        k = side(*shape, options)
        if k > max(shape) or options.rank > min(shape):
            raise PlanError(
                f"rank {options.rank} is larger than the matrix: it asks for a square of {k} x {k} on a weight of "
                f"{shape[0]} x {shape[1]}; lower the rank for this module"
            )

    def factors(self) -> tuple[Update | None, tuple[Tensor, ...]]:
        held = self.frozen_column
        return self.square if held is None else WithoutColumn(self.square, held), (self.M,)

    def squared_norms(self, weight: Tensor, squares: Tensor) -> Tensor:
        held = self.frozen_column is not None
        if held or not self.options.detach_norm or self.options.magnitude_axis == "input":
            return super().squared_norms(weight, squares)
        return self.square.squared_norms(weight, squares, self.M)
