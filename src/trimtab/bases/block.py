"""A block: a module of several others that takes a hidden state ``[..., in]`` and gives one ``[..., out]``, such as an
attention, an MLP or a whole decoder layer.

What comes in is the first positional argument, or the keyword that the block's ``forward`` names first. What goes out
is the block's output, or the first entry of it where that is a tuple or a list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import _base, _offloading, _registry
from trimtab.errors import PlanError, SurgeryError


class ModuleBlockBase(_base.BlockBase):
    """A module that holds others and can be called, and is not itself a layer that another base knows."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        named = [one for one in inspect.signature(module.forward).parameters.values() if one.kind != one.VAR_POSITIONAL]
        self._input = named[0].name if named else ""

    @staticmethod
    def knows(module: nn.Module) -> bool:
        # A bare list of modules holds others, too, and has no forward.
        return _base.can_be_called(module) and any(True for _ in module.children()) and _registry.find(module) is None

    @property
    def shape(self) -> tuple[int, int]:
        """Widths of the hidden states that go out and come in: what its last linear layer gives and its first one
        takes, or the ``hidden_size`` of its ``config``. Raises PlanError if neither is there or the two disagree."""
        name = type(self.module).__name__
        known = map(_registry.find, self.module.modules())
        layers = [layer.shape for layer in known if layer is not None and layer.is_linear]
        told = getattr(getattr(self.module, "config", None), "hidden_size", None)
        if layers and told in (None, layers[-1][0]):
            return layers[-1][0], layers[0][1]
        if isinstance(told, int) and not layers:
            return told, told
        why = (
            f"its last linear layer gives {layers[-1][0]}, and its config.hidden_size is {told}"
            if layers
            else "it has no linear layer that a base knows, and no config.hidden_size"
        )
        raise PlanError(f"the width of this {name}'s hidden state cannot be told: {why}. Set 'width' on the rule")

    @property
    def dtype(self) -> torch.dtype:
        floating = (one.dtype for one in self.module.parameters() if one.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        own = ((module, one) for module in self.module.modules() for one in module._parameters.values())
        devices = (_offloading.device_of(module, one) for module, one in own if one is not None)
        return next(devices, torch.get_default_device())

    def input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        state = args[0] if args else kwargs.get(self._input)
        return state if isinstance(state, Tensor) else None

    def changed(self, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        if not isinstance(output, (tuple, list)) or not output or not isinstance(output[0], Tensor):
            raise SurgeryError(
                f"the {type(self.module).__name__} that carries an adapter block gave a {type(output).__name__}: "
                "expected a tensor, or a tuple or list that begins with one. Match a block inside it"
            )
        values = [change(output[0]), *output[1:]]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
