"""The adapter of a PEFT layer as one of ours: it computes as ours do, and its tensors are PEFT's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import WeightBase
from trimtab.methods._method import Method
from trimtab.methods._norms import KeptNorm, SquaredNorms
from trimtab.methods.lora import LoRA, Options
from trimtab.ops.dropout import Keep
from trimtab.ops.frozen_linear import frozen_linear

Norms = tuple[float, SquaredNorms | None, KeptNorm | None]
"""A scale, and the norms that were kept from a pass with it."""


class PeftAdapter(LoRA):
    """What one PEFT layer keeps from one pass to the next, which are norms alone.

    Everything else may change between two passes (another adapter is active, its scale is set, a state is loaded), and
    is looked up in each.

    Args:
        base: the frozen layer under PEFT's.
        casts: whether PEFT casts a layer's input to the adapter's dtype under autocast, too.
    """

    def __init__(self, base: WeightBase, casts: bool) -> None:
        # Not LoRA's own way, which would draw tensors, and with them random numbers.
        Method.__init__(self, base, Options(rank=1, magnitude=True, across_groups=base.groups > 1))
        self.frozen_column, self.stored_transposed = base.frozen_column, base.stored_transposed
        self.groups = base.groups
        self.squares = self._kept = self._few_tokens = None
        self._scale = 1.0
        self._norms: Norms = (1.0, None, None)
        self._casts = casts
        self._dropout: nn.Module | None = None

    def compute(self, x: Tensor, base: WeightBase, layer: Any, name: str) -> Tensor:
        """The output of ``layer`` for ``x``, where its adapter ``name`` alone is active."""
        compiling = torch.compiler.is_compiling()
        one = self if compiling else self._for_one_pass()
        one._take(base, layer, name)
        output: Tensor = one._with_dropout(x, base) if one.drops(x) and one.magnitude is not None else one(x, base)
        if compiling:
            self._parameters.clear()
        else:
            self.__dict__["_norms"] = one._scale, one.squares, one._kept
        return output

    def _for_one_pass(self) -> PeftAdapter:
        """A copy that has what is kept. It takes the layer's tensors, and other threads have copies of their own."""
        one = object.__new__(PeftAdapter)
        scale, squares, kept = self._norms
        own = {"_parameters": {}, "_scale": scale, "squares": squares, "_kept": kept}
        one.__dict__.update(self.__dict__, **own)  # nn.Module's way of setting attributes takes several times as long
        return one

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_norms": (1.0, None, None)}

    def _take(self, base: WeightBase, layer: Any, name: str) -> None:
        scale = float(layer.scaling[name])
        if scale != self._scale:
            self._scale, self._kept = scale, None  # a norm that is kept belongs to a scale
        bias, held_by = None, layer._modules
        if name in held_by["lora_embedding_A"]:
            a, b = held_by["lora_embedding_A"][name], held_by["lora_embedding_B"][name]
        else:
            second = held_by["lora_B"][name]
            a, b, bias = held_by["lora_A"][name].weight, second.weight, second.bias
            dropout = held_by["lora_dropout"][name]
            self._dropout = None if isinstance(dropout, nn.Identity) or not dropout.training else dropout
        magnitudes = held_by["lora_magnitude_vector"]
        magnitude = magnitudes[name].weight if name in magnitudes else None
        held: dict[str, Any] = {"A": base.as_matrix("A", a), "B": base.as_matrix("B", b), "bias": bias}
        held["magnitude"] = None if magnitude is None else base.as_matrix("magnitude", magnitude)
        self._parameters.update(held)

    @property
    def scale(self) -> float:
        """What PEFT multiplies ``B A`` by, which can be set at any time."""
        return self._scale

    def bias_of(self, base: WeightBase) -> Tensor | None:
        own = base.bias
        if self.bias is None:
            return own
        added = self.bias * self._scale
        return added.to(base.dtype) if own is None else (own + added).to(own.dtype)

    def drops(self, x: Tensor) -> bool:
        return self._dropout is not None

    def draw(self, x: Tensor) -> Keep:
        """The mask that PEFT would draw: by its own dropout, on a tensor of the same shape and dtype."""
        assert self._dropout is not None
        casts = self._casts or not torch.is_autocast_enabled()
        with torch.no_grad():
            kept = self._dropout(torch.ones_like(x, dtype=self.A.dtype if casts else x.dtype))
        left = 1 - float(getattr(self._dropout, "p", 0.0))
        return Keep(kept.ne(0).to(torch.int8).neg_(), 1 / left if left else 0.0)

    def _with_dropout(self, x: Tensor, base: WeightBase) -> Tensor:
        """PEFT's DoRA with dropout, which drops of the input of ``(c - 1) W``, too. With ``d = dropout(x)`` that is

        x W^T + (c - 1) d W^T + c s d A^T B^T + bias = (x - d) W^T + c (d W^T + s d A^T B^T) + bias
        """
        keep, dtype = self.draw(x), base.dtype_for(x)
        mask = keep.mask.bool()
        rest = base.prepared(torch.where(mask, x * (1 - keep.scale), x))
        bare = frozen_linear(rest, base.weight(dtype), through=base.through, again=base.again(dtype))
        self._dropout = None  # what is left of x is all that there is
        return bare + self(torch.where(mask, x * keep.scale, 0), base)  # type: ignore[no-any-return]
