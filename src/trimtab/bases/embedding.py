"""Look-ups: ``nn.Embedding``, and the classes derived from it that only multiply what they look up by one number.

As a matrix the weight is ``[out, in] = [width, vocabulary]``, a column for each entry, and is stored the other way
round. A factor ``A [rank, vocabulary]`` is then a look-up itself, and a magnitude is one number for each feature of the
width, as in PEFT. A starts at zero and B is drawn, so that an entry that no batch has named stays as it is.

The padding entry gets no gradient, here as in ``nn.Embedding``. A look-up's input has no features, so nothing of it is
dropped, as in PEFT. ``sparse`` only says how a gradient is stored, and those of an adapter are dense.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.bases import _base
from trimtab.errors import PlanError

_FEW = 4  # entries of the small look-up that shows what a derived class computes


@dataclass(frozen=True)
class LookUp:
    """How entries go through the weight of one look-up."""

    padding: int | None
    by_frequency: bool
    scale: float | Tensor | None
    """What the layer multiplies its entries by; None for nothing."""

    reads_features: ClassVar[bool] = False
    takes_factors: ClassVar[bool] = True
    follows_autocast: ClassVar[bool] = False

    @property
    def ungrouped(self) -> LookUp:
        return self

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten()

    def tokens(self, rows: Tensor) -> int:
        return rows.shape[0]

    def _scaled(self, values: Tensor) -> Tensor:
        scale = self.scale
        if scale is None:
            return values
        return values * (scale.to(values.dtype) if isinstance(scale, Tensor) else scale)

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        by_frequency = self.by_frequency
        found = self._scaled(F.embedding(rows, weight.t(), padding_idx=self.padding, scale_grad_by_freq=by_frequency))
        return found if bias is None else found + bias

    def output(self, product: Tensor, shape: Sequence[int]) -> Tensor:
        # Not a view: autograd refuses to change a view that a custom function returned in place, and models do.
        shaped: Tensor = torch.ops.aten._unsafe_view(product, [*shape, product.shape[1]])
        return shaped

    def product_gradient(self, grad_output: Tensor) -> Tensor:
        return grad_output.reshape(-1, grad_output.shape[-1])

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        raise NotImplementedError("numbers of entries have no gradient")

    def add_input_gradient(self, target: Tensor, grad: Tensor, weight: Tensor) -> None:
        raise NotImplementedError("numbers of entries have no gradient")

    def weight_gradient(self, grad: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
        padding = -1 if self.padding is None else self.padding
        found: Tensor = torch.ops.aten.embedding_dense_backward(
            self._scaled(grad), rows, shape[1], padding, self.by_frequency
        )
        return found.t()


class EmbeddingBase(_base.WeightBase):
    """A dense look-up."""

    is_linear = False
    stored_transposed = True
    first_factor_zero = True
    stored_bias = None
    peft_names: ClassVar[Mapping[str, str]] = {
        "A": "lora_embedding_A",
        "B": "lora_embedding_B",
        "magnitude": "lora_magnitude_vector",
    }

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._scale = _scale_of(module)

    @staticmethod
    def knows(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and _base.holds_plain_weight(module) and _scale_of(module) is not None

    def require(self) -> None:
        layer: Any = self.module
        if layer.max_norm is not None:
            raise PlanError(
                f"this look-up has max_norm={layer.max_norm}: each pass shortens entries of the frozen weight itself, "
                "and an adapter of it would be one of another weight each time. Leave it out, or train it in full "
                "outside of the plan"
            )

    @property
    def frozen_column(self) -> int | None:
        return self.module.padding_idx  # type: ignore[return-value]

    def peft_differs(self, options: Any) -> str:
        if self._scale in ("embed_scale", 1.0):
            return ""
        return "PEFT leaves the number that this look-up multiplies by out of the update"

    @property
    def through(self) -> LookUp:  # type: ignore[override]
        layer: Any = self.module
        scale = getattr(layer, self._scale) if isinstance(self._scale, str) else self._scale
        plain = isinstance(scale, float) and scale == 1.0
        return LookUp(layer.padding_idx, layer.scale_grad_by_freq, None if plain else scale)

    @property
    def shape(self) -> tuple[int, int]:
        entries, width = self.parameter.shape
        return width, entries

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.at_hand().t()

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.t()


def _scale_of(module: Any) -> str | float | None:
    """What ``module`` multiplies its entries by: the name of the attribute that holds the number, or the number. None
    for a module that does something else.

    A derived class is asked by a small look-up in float64 with its attributes, so that it takes no more than a class
    that does as it says, whatever it is called.
    """
    kind: Any = type(module)
    if kind.forward is nn.Embedding.forward:
        return 1.0
    if len(inspect.signature(kind.forward).parameters) != 2:  # besides itself it takes the entries, no more
        return None
    small = object.__new__(kind)
    values = torch.randn(_FEW, module.embedding_dim, dtype=torch.float64, device="cpu", generator=torch.Generator())
    buffers = {
        # A model without memory for its tensors has no number either; any will do to see that it is the one.
        name: None if one is None else torch.full_like(one, 1.5, device="cpu") if one.is_meta else one.cpu()
        for name, one in module._buffers.items()
    }
    weight = {"weight": nn.Parameter(values, requires_grad=False)}
    own = {"_parameters": weight, "_buffers": buffers, "num_embeddings": _FEW, "padding_idx": None}
    small.__dict__.update(module.__dict__ | own)
    try:
        with torch.no_grad():
            found = kind.forward(small, torch.arange(_FEW))
    except Exception:  # it asks for something else than entries
        return None
    if not isinstance(found, Tensor) or found.shape != values.shape or found.dtype != values.dtype:
        return None
    numbers = {name: one for name, one in module.__dict__.items() if isinstance(one, float)}
    numbers |= {name: one for name, one in buffers.items() if one is not None and one.dim() == 0}
    for name in sorted(numbers, key=lambda name: name != "embed_scale"):
        if torch.equal(found, values * torch.as_tensor(numbers[name], dtype=values.dtype)):
            return str(name)
    scale = float((found / values)[0, 0])
    return scale if torch.allclose(found, values * scale, rtol=1e-12, atol=0) else None
