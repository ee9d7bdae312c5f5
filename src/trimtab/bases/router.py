"""Routers, which decide to which experts a token goes. In transformers 5 they are modules that multiply with a
``weight [experts, in]`` of their own; before, they were linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.bases import _base, _held


class RouterBase(_held.DenseHeldBase):
    """The weight of a router."""

    is_linear = False
    is_peft_parameter = True

    def peft_place(self, name: str) -> str | None:
        return name

    @staticmethod
    def holds(module: nn.Module) -> Sequence[str]:
        weight = module._parameters.get("weight")
        is_router = "Router" in type(module).__name__ and not isinstance(module, nn.Linear)
        return ["weight"] if is_router and _base.is_plain(weight) and weight is not None and weight.dim() == 2 else ()

    @staticmethod
    def knows(module: nn.Module) -> bool:
        return isinstance(module, _held.HeldWeight) and module.attribute in RouterBase.holds(module.holder)
