"""Full fine-tuning: the base itself is trained. The yardstick that every method is held against.

    W' = V        V starts at W, and so with every other tensor of the module: biases, norms, embeddings, all there is

The trained copy has its own dtype (float32 unless told otherwise), so that a bfloat16 base is trained with float32
master weights and small steps are not lost; the base stays as it was until the merge. With ``magnitude``, ``W' = m *
V / ||V||``: weight normalisation of the trained weight, for a layer that multiplies with one weight ``V [out, in]``.

With ``rows``, no more than these rows of an embedding or an output head are trained: new tokens, for instance.

A layer of one matrix keeps ``weight [out, in]`` and ``bias [out]``; any other module its own tensors, as it has them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from trimtab.bases import Base, Kind, WeightBase
from trimtab.errors import PlanError
from trimtab.methods import _method, _module, _rows, _weight
from trimtab.methods._method import TRAINING_ONLY
from trimtab.ops.frozen_linear import frozen_linear
from trimtab.ops.linear_map import multiply


class Options(_weight.WeightOptions):
    """What full fine-tuning can be told."""

    dropout: Annotated[float, TRAINING_ONLY] = Field(
        0.0, ge=0.0, le=0.0, description="Must be 0: there is no update whose input could be dropped."
    )
    compute: Literal["auto"] = Field("auto", description="There is one form only: the trained weight itself.")
    tensors: tuple[str, ...] | None = Field(
        None, min_length=1, description="Names of the module's own tensors that are trained. Default: all of them."
    )

    rows: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        min_length=1,
        description="Numbers of the rows of an embedding or an output head (tokens) that are trained, and nothing else "
        "of it. Default: all of them.",
    )
    bias: Literal[True] = Field(True, description="Always on: to leave a bias as it is, name the other tensors.")

    @field_validator("rows")
    @classmethod
    def _in_order(cls, rows: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if rows is None else tuple(sorted(set(rows)))

    @model_validator(mode="after")
    def _rows_alone(self) -> Options:
        if self.rows is not None and (self.magnitude or self.tensors is not None):
            raise ValueError("rows are trained as they are: leave 'magnitude' and 'tensors' out")
        return self

    @model_validator(mode="after")
    def _a_weight_to_decompose(self) -> Options:
        if self.magnitude and not self.trains("weight"):
            raise ValueError("magnitude: true trains the weight, too, which 'tensors' leaves out")
        return self

    @property
    def trains_bias(self) -> bool:
        return self.trains("bias")

    def trains(self, name: str) -> bool:
        """Whether the module's tensor ``name`` is trained, if it has one."""
        return self.tensors is None or name in self.tensors

    @classmethod
    def read(cls, stored: dict[str, Any], tensors: Collection[str]) -> Self:
        # Before there was such an option, a layer's weight was trained and its bias was not.
        return cls(**({} if "tensors" in stored else {"tensors": ["weight"]}) | stored)


class FullFineTuning(_weight.WeightMethod):
    """``weight [out, in]`` and ``bias [out]``: the trained copies."""

    options_type = Options
    options: Options
    trains_base = True
    weight: nn.Parameter | None

    def __init__(self, base: WeightBase, options: Options) -> None:
        super().__init__(base, options)
        own = ["weight", "bias"] if base.stored_bias is not None else ["weight"]
        if unknown := [name for name in options.tensors or () if name not in own]:
            raise PlanError(f"it has no tensor {unknown[0]!r}; a {type(base.module).__name__} has {', '.join(own)}")
        weight = base.weight().detach().to(self.dtype, copy=True) if options.trains("weight") else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))

    @classmethod
    def kind_for(cls, options: Options) -> Kind:
        if options.rows is not None:
            return "table"
        return "weight" if options.magnitude else "module"

    @classmethod
    def class_for(cls, base: Base) -> type[_method.Method]:
        if base.kind == "table":
            return _rows.RowsMethod
        return cls if base.kind == "weight" else _module.ModuleMethod

    @torch.no_grad()
    def effective_weight(self, base: WeightBase, dtype: torch.dtype | None = None) -> Tensor:
        effective = super().effective_weight(base, dtype)
        return effective.detach().clone() if effective is self.weight else effective

    def total(self, weight: Tensor) -> Tensor:
        return weight if self.weight is None else self.held(self.weight).to(weight.dtype)

    def starts_at_base(self, name: str) -> bool:
        return name == "weight" or super().starts_at_base(name)

    def of_base(self, name: str, base: WeightBase) -> Tensor:
        return base.weight() if name == "weight" else super().of_base(name, base)

    @property
    def changes_weight(self) -> bool:
        return self.weight is not None

    def copies(self, base: WeightBase) -> dict[str, nn.Parameter]:
        mine = super().copies(base)
        return mine if self.weight is None or base.stored_transposed else {**mine, "weight": base.parameter}

    def forward(self, x: Tensor, base: WeightBase) -> Tensor:
        x, dtype = base.prepared(x), base.dtype_for(x)
        bias = self.bias_of(base)
        if self.weight is None:
            return frozen_linear(x, base.weight(dtype), bias, through=base.through, again=base.again(dtype))
        weight = self.weight.to(dtype)
        ratio = self.ratio(weight, base)
        if ratio is None:
            return multiply(base.through, x, weight, bias)
        if self.options.magnitude_axis == "input":
            if base.through.reads_features:
                return multiply(base.through, (x * ratio).to(x.dtype), weight, bias)
            return multiply(base.through, x, (weight * ratio).to(weight.dtype), bias)
        rows = base.through.rows(x)
        product = base.through.product(rows, weight)
        places = [-1] if product.dim() == 2 else [-1, 1]  # the channels of a convolution come before the places
        scaled = (product * ratio.view(places)).to(product.dtype)
        if bias is not None:
            scaled = scaled + bias.to(product.dtype).view(places)
        return base.through.output(scaled, x.shape)
