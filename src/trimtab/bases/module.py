"""Any module that holds parameters of its own and can be called: a norm, an embedding, a recurrent layer, what a model
defines for itself. It is trained as a whole, by methods that train the base itself.

Parameters in a container that cannot be called (``nn.ParameterList``) belong to the module that calls upon them. A
module inside that can be called is one of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from trimtab.bases import _base


class AnyModuleBase(_base.ModuleBase):
    """A module with tensors of its own, whatever they are called and however they are shaped."""

    @staticmethod
    def knows(module: nn.Module) -> bool:
        held = list(_base.own_parameters(module))
        plain = all(_base.is_plain(parameter) for _, parameter in held)
        return _base.can_be_called(module) and plain and (bool(held) or isinstance(module, _NormBase))

    @property
    def shape(self) -> tuple[int, int]:
        largest = max(self.tensors().values(), key=torch.numel)
        rows = largest.shape[0] if largest.dim() else 1
        return rows, largest.numel() // max(rows, 1)

    def tensors(self) -> dict[str, Tensor]:
        return dict(_base.own_parameters(self.module)) | dict(_buffers(self.module))

    def call(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        module: Any = self.module
        if getattr(module, "sparse", False) and not isinstance(tensors.get("weight"), nn.Parameter):
            module = copy.copy(module)  # a gradient that is stored sparsely cannot be cast to the dtype of the copy
            module.sparse = False
        return functional_call(module, dict(tensors), args, dict(kwargs), tie_weights=False)

    def hang(self, name: str, parameter: nn.Parameter) -> None:
        place, _, own = name.rpartition(".")
        self.module.get_submodule(place)._parameters[own] = parameter


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module counts as it trains, such as the statistics of a batch norm. What is made again and not stored with
    the module is no part of it."""
    for prefix, holder in _base.holders(module):
        for name, buffer in holder._buffers.items():
            if buffer is not None and name not in holder._non_persistent_buffers_set:
                yield prefix + name, buffer
