"""Trained tensors that are spread over several processes, made whole to be saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trimtab.methods import Method
from trimtab.surgery.wrappers import whole, without_wrappers


@contextmanager
def whole_tensors(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """A context in which the modules of ``model`` that train, or that count statistics, hold whole tensors where theirs
    are sharded (FSDP2's), so that what saves them need not know of it. The tensors come from ``state_dict`` where it
    has them. Else all processes gather them, and therefore must enter together."""
    given = state_dict or {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}  # a parameter of two modules stays one
    try:
        for prefix, holder in list(model.named_modules()):
            own = {key: parameter for key, parameter in holder._parameters.items() if parameter is not None}
            trains = isinstance(holder, Method) or any(parameter.requires_grad for parameter in own.values())
            if not trains and not isinstance(holder, _NormBase):
                continue
            for key, parameter in own.items():
                name = without_wrappers(model, f"{prefix}.{key}" if prefix else key)
                value = given.get(name, whole(parameter))
                if value is not parameter:
                    replaced.append((holder, key, parameter))
                    holder._parameters[key] = made.setdefault(id(parameter), _parameter(value, parameter.requires_grad))
        yield
    finally:
        for holder, key, parameter in replaced:
            holder._parameters[key] = parameter


def _parameter(value: Tensor, trained: bool) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=trained)
