"""The module that stands where an adapted layer stood: the frozen layer and its adapter, side by side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trimtab.bases import Base
from trimtab.methods import Method


class Adapted(nn.Module):
    """A frozen layer ``base`` with an ``adapter`` beside it.

    ``weight`` is the effective weight, laid out as the frozen layer stores its own and computed anew at every look:
    code that reads a layer's weight in place of calling the layer (fused attention, tied heads) then sees what the
    layer does. It is a copy without gradient; writing to it changes nothing.
    """

    def __init__(self, handle: Base, adapter: Method, method: str, rule: int) -> None:
        super().__init__()
        self.base = handle.module
        self.adapter = adapter
        self.handle = handle
        self.method = method
        self.rule = rule
        self.train(handle.module.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x, self.handle)

    @property
    def weight(self) -> Tensor:
        return self.handle.as_stored(self.adapter.effective_weight(self.handle)).to(self.handle.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.handle.bias

    @property
    def in_features(self) -> int:
        return self.handle.shape[1]

    @property
    def out_features(self) -> int:
        return self.handle.shape[0]

    def extra_repr(self) -> str:
        return f"method={self.method}, rule={self.rule}"


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every adapted module of ``model`` once, under its first name, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every place where a child hangs, as (full name, parent, attribute, child); a shared child comes once for each
    place."""
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                yield (f"{prefix}.{attribute}" if prefix else attribute), parent, attribute, child


def weights_elsewhere(model: nn.Module, parameter: nn.Parameter, inside: set[int]) -> bool:
    """Whether some module other than those in ``inside`` (by id) holds ``parameter`` too."""
    return any(
        held is parameter
        for module in model.modules()
        if id(module) not in inside
        for held in module._parameters.values()
    )


@torch.no_grad()
def is_finite(adapter: Method) -> bool:
    """Whether every trained tensor holds numbers only."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in adapter.parameters())
