"""Full fine-tuning: the base itself is trained. The yardstick that every method is held against.

    W' = V        V [out, in] starts at W

The trained copy has its own dtype (float32 unless told otherwise), so that a bfloat16 base is trained with float32
master weights and small steps are not lost; the base stays as it was until the merge. With ``magnitude``, ``W' = m *
V / ||V||``: weight normalisation of the trained weight.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from trimtab.bases import WeightBase
from trimtab.methods import _weight
from trimtab.methods._method import TRAINING_ONLY
from trimtab.ops.linear_map import multiply


class Options(_weight.WeightOptions):
    """What full fine-tuning can be told."""

    dropout: Annotated[float, TRAINING_ONLY] = Field(
        0.0, ge=0.0, le=0.0, description="Must be 0: there is no update whose input could be dropped."
    )
    compute: Literal["auto"] = Field("auto", description="There is one form only: the trained weight itself.")


class FullFineTuning(_weight.WeightMethod):
    """``weight [out, in]``: the trained copy."""

    options_type = Options
    options: Options
    trains_base = True

    def __init__(self, base: WeightBase, options: Options) -> None:
        super().__init__(base, options)
        self.weight = nn.Parameter(base.weight().detach().to(self.dtype, copy=True))

    def total(self, weight: Tensor) -> Tensor:
        return self.weight.to(weight.dtype)

    def forward(self, x: Tensor, base: WeightBase) -> Tensor:
        weight = self.weight.to(base.dtype_for(x))
        ratio = self.ratio(weight)
        if ratio is None:
            return multiply(base.through, x, weight, base.bias)
        if self.options.magnitude_axis == "input":
            if base.through.reads_features:
                return multiply(base.through, (x * ratio).to(x.dtype), weight, base.bias)
            return multiply(base.through, x, (weight * ratio).to(weight.dtype), base.bias)
        rows = base.through.rows(x)
        product = base.through.product(rows, weight)
        scaled = (product * ratio).to(product.dtype)
        return base.through.output(scaled if base.bias is None else scaled + base.bias.to(product.dtype), x.shape)
