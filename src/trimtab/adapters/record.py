"""The adapter of one module as every format reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trimtab.bases import Base, WeightBase
from trimtab.errors import PlanError
from trimtab.methods import Method, Options, lora, method_class

B_BIAS = "B.bias"
"""The tensor of an update ``s (B A x + b)`` that stands for ``b [out]``, until it is one with the layer's bias."""


@dataclass(frozen=True)
class StoredAdapter:
    """The adapter of one module."""

    method: str
    options: Options
    tensors: dict[str, Tensor]
    shape: tuple[int, ...] | None = None
    """``(out, in)`` of the weight that the adapter was made for, if the format stores it."""
    base: Tensor | None = None
    """That weight itself, if the format stores it."""
    parameters: Mapping[str, Options] = field(default_factory=dict)
    """The parameters of the module that it may be for, with the options on each, if the format does not say which."""
    in_layout: bool = False
    """Whether the tensors have the shapes that PEFT gives them on this kind of layer (``WeightBase.in_layout``)."""

    beside: bool = False
    """Whether they are tensors of the model's own that were stored beside an adapter, and may not be trained at all."""

    apart: bool = False
    """Whether the module's weight has other values than that of a module which shares it."""

    alone: bool = False
    """Whether PEFT had the layer by itself, and not as a part of a module that it wraps (an attention)."""

    @property
    def method_class(self) -> type[Method]:
        """The class of its method."""
        return method_class(self.method)

    def on(self, handle: Base) -> StoredAdapter:
        """The same with the tensors that a method has on the layer of ``handle``."""
        if not (self.in_layout and isinstance(handle, WeightBase)):
            return self
        own = {handle.peft_key(name): tensor for name, tensor in self.tensors.items()}
        # A part of an attention that PEFT had by itself: it does not read that adapter, and merges it as of any layer.
        by_itself = self.alone and handle.peft_partner("") is not None
        tensors = own if by_itself else {name: handle.as_matrix(name, tensor) for name, tensor in own.items()}
        if B_BIAS in tensors and isinstance(self.options, lora.Options):
            # s (B A x + b) beside the layer's bias: one bias, trained.
            added, bias = self.options.scale * tensors.pop(B_BIAS), tensors.get("bias", handle.bias)
            tensors["bias"] = added if bias is None else _wide(bias) + added
        if "weight" in tensors:  # the layer's own
            tensors["weight"] = handle.as_weight(tensors["weight"])
        return replace(self, tensors=tensors, in_layout=False)

    def fitted(self, handle: Base | None) -> StoredAdapter:
        """The same with the options that PEFT's tensors ask for on the layer of ``handle``. Raises PlanError if PEFT
        computes something there that we do not."""
        if not (self.in_layout and "A" in self.tensors and isinstance(handle, WeightBase)):
            return self
        dropout = {} if handle.is_called else {"dropout": 0.0}  # PEFT sets it, and no input passes by
        options = self.options.model_copy(update={**handle.peft_options(self.tensors), **dropout})
        if why := handle.peft_differs(options):
            raise PlanError(f"{why}, so the model would not compute what it was trained to")
        return replace(self, options=options)

    def require_fit(self, handle: Base) -> None:
        """Raise PlanError for what the layer of ``handle`` cannot have: a rank above the matrix's that the tensors do
        not have, or a bias in the update of a weight that is only read."""
        if not isinstance(handle, WeightBase):
            return
        if not self._has_rank(handle.shape):
            self.method_class.require_fit(self.options, handle.shape)
        if B_BIAS in self.tensors and not handle.is_called:
            raise PlanError("its update has a bias (PEFT's lora_bias), and the weight is read and adds none")

    def was_made_for(self, handle: Base) -> bool:
        """Whether its ``base``, if it is stored, is the weight of ``handle``, as far as the coarser of their two dtypes
        can tell: a model is trained in bfloat16 and used in float32, or the other way round. Of a quantised weight the
        shape alone is compared."""
        if self.base is None:
            return True
        if not isinstance(handle, WeightBase):
            return False
        if not handle.stored_dense:
            return tuple(self.base.shape) == handle.shape
        return self.base.is_floating_point() and nearly_equal(self.base, handle.at_hand())

    def shares(self, key: str, other: StoredAdapter, twin: str) -> bool:
        """Whether its tensor ``key`` is the tensor ``twin`` of ``other``, and was trained with the same options."""
        mine, theirs = self.tensors.get(key), other.tensors.get(twin)
        known = mine is not None and theirs is not None and torch.equal(mine, theirs)
        return known and (self.options == other.options or self.method == other.method == "full")

    def _has_rank(self, shape: tuple[int, int]) -> bool:
        """Whether the tensors ``A`` and ``B`` are of the options' rank on a weight, or a stack of weights, of ``shape``
        ``(out, in)``."""
        rank, a, b = getattr(self.options, "rank", 0), self.tensors.get("A"), self.tensors.get("B")
        if not rank or a is None or b is None:
            return False
        if getattr(self.options, "across_groups", False):
            return a.numel() % (rank * shape[1]) == 0 and b.numel() % shape[0] == 0
        weights = a.numel() // (rank * shape[1])
        return weights > 0 and (a.numel(), b.numel()) == (weights * rank * shape[1], weights * rank * shape[0])


def _wide(bias: Tensor) -> Tensor:
    """``bias`` where files are read, in float32 at least."""
    return bias.detach().to("cpu", torch.promote_types(bias.dtype, torch.float32))


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, as far as the coarser of their two dtypes can tell; of a model without weights, on
    the meta device, as far as their shapes can."""
    if one.is_meta or other.is_meta:
        return one.shape == other.shape
    one, other = one.detach().cpu(), other.detach().cpu()
    if one.shape != other.shape or not (one.is_floating_point() and other.is_floating_point()):
        return one.shape == other.shape and torch.equal(one, other)
    if one.dtype == other.dtype:
        return torch.equal(one, other)
    limits = [torch.finfo(tensor.dtype) for tensor in (one, other)]
    # Each of the two may have been rounded on its own, from a third: by half a unit of its last place at most, which
    # among the smallest numbers of float16 is that of its smallest one.
    tiny = max(limit.smallest_normal * limit.eps for limit in limits)
    return torch.allclose(one.double(), other.double(), rtol=max(limit.eps for limit in limits), atol=tiny)
