"""What a user is told who takes the weight of an adapted module for one of its own, to be trained or replaced."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trimtab import bases
from trimtab.errors import SurgeryError, TrimtabWarning
from trimtab.methods import NO_MEMORY


def tell_of_no_gradient(layer: Any) -> None:
    """Warn, once, where the frozen weight of an adapted ``layer`` asks for a gradient that it does not get."""
    adapter = layer.current_adapter
    if not layer.handle.parameter.requires_grad or adapter.trains_base or adapter.told_of_no_gradient:
        return
    adapter.told_of_no_gradient = True
    warnings.warn(
        f"the weight of {_named(layer)} under an adapter of method {layer.method} asks for a gradient (requires_grad) "
        "and gets none: it stays as it is. To train the weight itself, use method full, or leave the layer out of the "
        "plan; else freeze it (requires_grad_(False))",
        TrimtabWarning,
        stacklevel=2,
    )


def tell_of_twice(layer: Any, value: Any) -> None:
    """Warn where ``value``, assigned to the weight of an adapted ``layer``, may have been computed from one that has
    the adapter in it."""
    adapter = layer.current_adapter
    if layer.off or not adapter.was_read or value is layer.handle.parameter:
        return
    adapter.was_read = False
    warnings.warn(
        f"the weight assigned to {_named(layer)} is its frozen one, and the adapter ({layer.method}) acts on top. If "
        "it was computed from the layer's weight, which has the adapter in it, the adapter acts twice: call "
        "trimtab.merge before what fuses or rewrites weights (torch.nn.utils.fusion, for instance), or read "
        "layer.base.weight",
        TrimtabWarning,
        stacklevel=2,
    )


def trained_already(module: Any, name: str) -> SurgeryError:
    """The refusal to replace the tensor ``name`` of an adapted ``module``."""
    return SurgeryError(
        f"the {name} of this {type(module.base).__name__} is trained by an adapter of method {module.method}, and "
        "cannot be replaced. Change the tensors of the adapter (module.adapter), or call trimtab.merge first"
    )


def require_not_its_weight(layer: Any, name: str, value: Tensor | None) -> None:
    """Raise SurgeryError where ``value``, to be the parameter ``name`` of an adapted ``layer``, is the weight that the
    layer acts with: what rewrites a weight in place keeps it so."""
    if value is None or (isinstance(value, nn.Parameter) and all(value is not one for one in layer.parameters())):
        return
    raise SurgeryError(
        f"{_named(layer)} cannot hold its weight as {name}: that weight has the adapter in it. Call trimtab.merge "
        "before what rewrites weights in place (torch.nn.utils.prune, for instance), or do that before trimtab.attach "
        "and make it permanent (prune.remove)"
    )


def require_usable(layer: Any) -> None:
    """Raise SurgeryError, in words, for what a pass of ``layer``, or a look at its weight, can fail at: an adapter
    without numbers, or a weight that is stored in another way than when the layer got its adapter."""
    handle = layer.handle
    if not isinstance(handle, bases.WeightBase):
        return
    if not handle.parameter.is_meta and any(tensor.is_meta for tensor in layer.current_adapter.parameters()):
        raise SurgeryError(NO_MEMORY.format(method=layer.method))
    now = bases.find(handle.module)
    if isinstance(now, bases.QuantisedBase) and type(now) is not type(handle):
        raise SurgeryError(
            f"the weight of {_named(layer)} was quantised after its adapter ({layer.method}) was attached, and is a "
            f"{type(handle.parameter).__name__} now, which the adapter cannot compute with. Quantise the model before "
            "trimtab.attach or trimtab.load_adapter; an adapter that is trained can be saved here and loaded there"
        )


@contextmanager
def usable(layers: Iterable[Any]) -> Iterator[None]:
    """Tell in words of what torch does not compute with the weights of adapted ``layers``."""
    try:
        yield
    except NotImplementedError:
        for layer in layers:
            require_usable(layer)
        raise


def _named(layer: Any) -> str:
    return f"an adapted {type(layer.base).__name__} {list(layer.handle.parameter.shape)}"
