"""What a merge writes: the tensors of a frozen module that an adapter changes, each with the value that it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.ops.spread import whole, write
from trimtab.surgery.adapted import Adapted, AdaptedLayer, AdaptedModule


@dataclass(frozen=True)
class MergedPart:
    """One tensor of a frozen module.

    Attributes:
        stored: the tensor that the module holds now.
        value: what it becomes, in float64 if it is computed.
        write: rounds a value to what the module stores, in place.
        read: what the module then computes with.
        hang: hangs another parameter into its place.
        source: what its value is made of: parts of one tensor and one source are one.
        untie: gives the module a parameter of its own, equal to the one that it shared.
    """

    stored: Callable[[], Tensor]
    value: Callable[[], Tensor]
    write: Callable[[Tensor], object]
    read: Callable[[], Tensor]
    hang: Callable[[nn.Parameter], None]
    untie: Callable[[], None]
    source: object


def merged_parts(module: Adapted) -> Iterator[MergedPart]:
    """All that is merged of ``module``: a weight and a bias, or the tensors of a module that is trained as a whole."""
    adapter = module.current_adapter
    if isinstance(module, AdaptedLayer):
        handle = module.handle
        if adapter.changes_weight:
            yield MergedPart(
                stored=lambda: handle.parameter,
                value=lambda: adapter.effective_weight(handle, torch.float64),
                write=handle.write,
                read=handle.weight,
                hang=handle.replace,
                untie=handle.untie,
                # A copy of the weight may be shared with a module of another kind, such as an embedding.
                source=adapter.weight if adapter.trains_base and adapter.magnitude is None else adapter,
            )
        bias: Tensor | None = adapter.bias
        if bias is not None and handle.stored_bias is not None:
            own = partial(getattr, handle, "stored_bias")
            part = _copied(own, bias, lambda own: whole(bias).detach(), handle.replace_bias)
            yield replace(part, write=handle.write_bias, read=partial(getattr, handle, "bias"))
    elif isinstance(module, AdaptedModule):
        for name, tensor in adapter.stored_tensors().items():
            hang = partial(module.handle.hang, name)
            yield _copied(partial(_own, module, name), tensor, partial(adapter.merged, name), hang)


def _own(module: AdaptedModule, name: str) -> Tensor:
    return module.handle.tensors()[name]


def _copied(
    stored: Callable[[], Tensor],
    trained: Tensor,
    merged: Callable[[Tensor], Tensor],
    hang: Callable[[nn.Parameter], None],
) -> MergedPart:
    def untie() -> None:
        shared = stored()
        hang(nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))

    return MergedPart(
        stored=stored,
        value=lambda: merged(stored()),
        write=lambda value: write(stored(), value),
        read=lambda: whole(stored()),
        hang=hang,
        untie=untie,
        source=trained,
    )
