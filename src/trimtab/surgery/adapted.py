"""The module that stands where an adapted module stood: the frozen module and its adapter, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import Base, BlockBase, WeightBase
from trimtab.methods import Method


class Adapted(nn.Module):
    """A frozen module ``base`` with an ``adapter`` beside it."""

    handle: Base

    def __init__(self, handle: Base, adapter: Method, method: str, rule: int) -> None:
        super().__init__()
        self.base = handle.module
        self.adapter = adapter
        self.handle = handle
        self.method = method
        self.rule = rule
        self.training = handle.module.training  # the modules inside a block may be in another mode
        adapter.train(self.training)

    @staticmethod
    def around(handle: Base, adapter: Method, method: str, rule: int) -> Adapted:
        """An adapted module of the kind that ``handle`` asks for."""
        kind = AdaptedBlock if handle.kind == "block" else AdaptedLayer
        return kind(handle, adapter, method, rule)

    def remove(self) -> nn.Module:
        """The frozen module, without whatever the adapter put onto it."""
        return self.base

    def extra_repr(self) -> str:
        return f"method={self.method}, rule={self.rule}"


class AdaptedLayer(Adapted):
    """A frozen layer that is one matrix product, with an adapter.

    ``weight`` is the effective weight, laid out as the frozen layer stores its own. So code that reads a layer's weight
    instead of calling the layer (fused attention, tied heads) gets what the layer computes with. It is computed each
    time it is read, has no gradient, and writing to it changes nothing.
    """

    handle: WeightBase

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.adapter(x, self.handle)
        return output

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


class AdaptedBlock(Adapted):
    """A frozen block with an adapter that changes the hidden state in its output.

    It does so in a hook on the block. Therefore other hooks, such as those that record hidden states, get the changed
    output, and PyTorch's fused encoder layer, which would not call the block, is not used while the hook is there. An
    attribute that is not the adapter's is looked up on the block.
    """

    handle: BlockBase

    def __init__(self, handle: Base, adapter: Method, method: str, rule: int) -> None:
        super().__init__(handle, adapter, method, rule)
        self._hook = self.base.register_forward_hook(self._change, with_kwargs=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def _change(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = self.handle.input(args, kwargs)
        return self.handle.changed(output, lambda hidden: self.adapter(x, hidden))

    def remove(self) -> nn.Module:
        self._hook.remove()
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While it is being copied, it has no block yet and is asked for names such as __deepcopy__.
            if name.startswith("__") or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)


def bare(module: nn.Module) -> nn.Module:
    """``module``, or the frozen module in it if it is an adapted one."""
    return module.base if isinstance(module, Adapted) else module


def block_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of repeated blocks of ``model``. Their blocks are of one class; a list inside a block is none."""
    for module in model.children():
        if isinstance(module, nn.ModuleList) and len({type(bare(child)) for child in module}) == 1:
            yield module
        else:
            yield from block_lists(module)


def bare_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name as it would be without adapters. A module comes once for each name that it has.

    An adapted module comes in the place of the one that it adapts.
    """
    yield name, model
    for attribute, child in bare(model)._modules.items():
        if child is not None:
            yield from bare_modules(child, f"{name}.{attribute}" if name else attribute)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every adapted module of ``model`` once, under its first name, in the model's order."""
    seen = set()
    for name, module in bare_modules(model):
        if isinstance(module, Adapted) and id(module) not in seen:
            seen.add(id(module))
            yield name, module


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every place that holds a module, as (full name, parent, attribute, child). A shared child has several places."""
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                yield (f"{prefix}.{attribute}" if prefix else attribute), parent, attribute, child


def weights_elsewhere(model: nn.Module, parameter: nn.Parameter, inside: set[int]) -> bool:
    """Whether a module that is not among the ids in ``inside`` holds ``parameter``, too."""
    return any(
        held is parameter
        for module in model.modules()
        if id(module) not in inside
        for held in module._parameters.values()
    )


@torch.no_grad()
def is_finite(adapter: Method) -> bool:
    """Whether no trained tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in adapter.parameters())
