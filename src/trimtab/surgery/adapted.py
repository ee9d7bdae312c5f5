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
        self.training = handle.module.training  # not what is inside: a block may hold modules in another mode
        adapter.train(self.training)

    @staticmethod
    def around(handle: Base, adapter: Method, method: str, rule: int) -> Adapted:
        """An adapted module of the kind that ``handle`` asks for."""
        kind = AdaptedBlock if handle.kind == "block" else AdaptedLayer
        return kind(handle, adapter, method, rule)

    def remove(self) -> nn.Module:
        """The frozen module, rid of whatever the adapter needed on it."""
        return self.base

    def extra_repr(self) -> str:
        return f"method={self.method}, rule={self.rule}"


class AdaptedLayer(Adapted):
    """A frozen layer that is one matrix product, with an adapter.

    ``weight`` is the effective weight, laid out as the frozen layer stores its own and computed anew at every look:
    code that reads a layer's weight in place of calling the layer (fused attention, tied heads) then sees what the
    layer does. It is a copy without gradient; writing to it changes nothing.
    """

    handle: WeightBase

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


class AdaptedBlock(Adapted):
    """A frozen block with an adapter that changes the hidden state in its output.

    It does so in a hook on the block: whatever else watches the block, such as a recorder of hidden states, sees what
    the block now gives, and PyTorch's fused encoder layer, which would pass a block by, makes way for the hook. Any
    attribute that is not its own is the block's.
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
            # A copy in the making has no block yet, and is asked for names such as __deepcopy__.
            if name.startswith("__") or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)


def bare(module: nn.Module) -> nn.Module:
    """``module``, or the frozen one in it if it is adapted."""
    return module.base if isinstance(module, Adapted) else module


def block_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of repeated blocks of ``model``: those of children of one kind, the outermost of each place."""
    for module in model.children():
        if isinstance(module, nn.ModuleList) and len({type(bare(child)) for child in module}) == 1:
            yield module
        else:
            yield from block_lists(module)


def bare_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each name that it has in the bare model; an adapted one stands for the module it adapts.

    So what is inside an adapted block has the name that it has without the adapter.
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
