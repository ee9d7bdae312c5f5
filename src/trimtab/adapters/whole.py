"""Trained tensors that are spread over several processes, made whole to be saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from trimtab.surgery.adapted import Adapted
from trimtab.surgery.wrappers import whole, without_wrappers


@contextmanager
def whole_tensors(
    model: nn.Module, adapted: Iterable[Adapted], state_dict: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """A context in which the adapters of ``model`` hold whole tensors where theirs are sharded (FSDP2's), so that a
    format need not know of it. They come from ``state_dict`` where it has them. Else all processes gather them, and
    therefore must enter together."""
    given = state_dict or {}
    names = {id(parameter): without_wrappers(model, name) for name, parameter in model.named_parameters()}
    replaced = []
    try:
        for holder in [inner for module in adapted for inner in module.adapter.modules()]:
            for key, parameter in holder._parameters.items():
                if parameter is None:
                    continue
                value = given.get(names.get(id(parameter), ""), whole(parameter))
                if value is not parameter:
                    replaced.append((holder, key, parameter))
                    holder._parameters[key] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for holder, key, parameter in replaced:
            holder._parameters[key] = parameter
