"""The changes that the adapters of a model make to weights: ``dW`` of each, with where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab import bases
from trimtab.bases import TurnedBase, WeightBase
from trimtab.errors import PlanError, SurgeryError
from trimtab.methods import lora
from trimtab.surgery.adapted import Adapted, AdaptedBlock, AdaptedModule


@dataclass
class ChangedWeight:
    """One change of a weight, which several modules may share.

    Attributes:
        names: of the modules.
        handles: on the layer that each of them is.
        handle: on the weight, ``[out, in]`` the way round in which the adapter sees it.
        method: of the adapter.
        delta: computes dW ``[..., out, in]`` in float64.
        low_rank: ``(A, B)`` in float64 with ``dW = B A``, where the adapter is plain LoRA; computed when called.
        bias: the trained bias, where it differs from the layer's own.
    """

    names: list[str]
    handles: list[WeightBase]
    handle: WeightBase
    method: str
    delta: Callable[[], Tensor]
    low_rank: Callable[[], tuple[Tensor, Tensor]] | None = None
    bias: Tensor | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    def join(self, other: ChangedWeight) -> None:
        """Take the modules of ``other`` in, which has the same change."""
        self.names += other.names
        self.handles += other.handles
        if isinstance(self.handle, TurnedBase):  # rather the layer that the adapter was made for
            self.handle, self.delta = other.handle, other.delta
        self.bias = other.bias if self.bias is None else self.bias

    @property
    def is_in_one_direction(self) -> bool:
        """Whether all modules multiply with the weight the same way round."""
        return all(one.stored_transposed == self.handle.stored_transposed for one in self.handles)


def changed_weights(entries: Mapping[str, Adapted], verb: str) -> tuple[list[ChangedWeight], dict[str, str]]:
    """The changes that an adapter makes, whose ``entries`` these are (`surgery.names.entries`); and the modules where
    it changes no weight in a way that a matrix of low rank could, with the reason.

    Raises SurgeryError if it sits on a block, or holds NaN or infinity.
    """
    found: dict[Any, ChangedWeight] = {}
    kept: dict[str, str] = {}
    for name, module in entries.items():
        if isinstance(module, AdaptedBlock):
            raise SurgeryError(
                f"{verb}: the adapter of {name} (method {module.method}) sits on a block: an activation stands between "
                "its two products, so it changes no weight. Nothing was changed; keep this adapter as it is, or train "
                "one that changes weights (lora, dora, mora, full)"
            )
        for key, tensor in module.adapter.stored_tensors().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise SurgeryError(
                    f"{verb}: {name}.{key} holds NaN or infinity. Nothing was changed; load an earlier checkpoint"
                )
        one = _of_module(name, module) if isinstance(module, AdaptedModule) else _of_layer(name, module)
        if isinstance(one, str):
            kept[name] = one
            continue
        key, change = one
        if key in found:
            found[key].join(change)
        else:
            found[key] = change
    return list(found.values()), kept


def _of_layer(name: str, module: Any) -> tuple[Any, ChangedWeight] | str:
    """The change of a layer whose adapter computes with its weight."""
    adapter, handle = module.adapter, module.handle
    if not adapter.changes_weight:
        return "its bias alone is trained"
    if getattr(adapter, "groups", 1) > 1:
        return "its update reads all groups of a convolution (across_groups), and no kernel of the layer's own does"
    seen = handle if handle.stored_transposed == adapter.stored_transposed else TurnedBase(handle)
    plain = isinstance(adapter, lora.LoRA) and adapter.magnitude is None
    # A copy of a weight may be shared with a module of another kind, such as an embedding.
    shared = adapter.weight if adapter.trains_base and adapter.magnitude is None else adapter
    return id(shared), ChangedWeight(
        [name],
        [handle],
        seen,
        module.method,
        delta=partial(_product if plain else _delta, adapter, seen),
        low_rank=partial(_factors, adapter) if plain else None,
        bias=_changed_bias(adapter.bias, handle.bias),
    )


@torch.no_grad()
def _delta(adapter: Any, handle: WeightBase) -> Tensor:
    delta: Tensor = adapter.effective_weight(handle, torch.float64)
    return delta - handle.weight().to(torch.float64)


def _product(adapter: Any, handle: WeightBase) -> Tensor:
    a, b = _factors(adapter)
    return b @ a


def _factors(adapter: Any) -> tuple[Tensor, Tensor]:
    return adapter.A.detach().double(), adapter.options.scale * adapter.B.detach().double()


def _of_module(name: str, module: AdaptedModule) -> tuple[Any, ChangedWeight] | str:
    """The change of a module that is trained as a whole, where it is a layer with one weight."""
    adapter: Any = module.adapter
    kind = type(module.base).__name__
    if module.handle.kind == "table":
        return f"{len(adapter.options.rows)} of its rows are trained, and kept as rows"
    handle = bases.find(module.base)
    if handle is None:
        return f"a {kind} multiplies with no matrix, so its tensors are kept whole"
    mine = adapter.stored_tensors()
    if "weight" not in mine or not mine.keys() <= {"weight", "bias"}:
        return f"of this {kind}, {', '.join(mine)} are trained"
    try:
        handle.require()
    except PlanError as error:
        return str(error)
    return id(mine["weight"]), ChangedWeight(
        [name],
        [handle],
        handle,
        module.method,
        delta=lambda: handle.as_weight(mine["weight"].detach()).double() - handle.weight().double(),
        bias=_changed_bias(mine.get("bias"), handle.bias),
    )


def _changed_bias(mine: Tensor | None, own: Tensor | None) -> Tensor | None:
    """A trained bias, if it is another than the layer's own."""
    if mine is None or (own is not None and torch.equal(mine.detach().to(own.dtype), own.detach())):
        return None
    return mine.detach()
