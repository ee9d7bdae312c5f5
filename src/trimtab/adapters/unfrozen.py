"""What is trained outside of the adapters: tensors that were unfrozen by hand, and batch statistics that were counted.

They are part of what was learned. So they are saved as what they are to whoever loads them: entries of method ``full``
on the modules that hold them, or the trained bias of an adapted layer. The model itself is not changed by that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trimtab import bases, methods
from trimtab.adapters.record import StoredAdapter
from trimtab.bases import Base, HeldWeight, WeightBase
from trimtab.errors import AdapterError
from trimtab.ops.spread import write
from trimtab.surgery.adapted import Adapted, AdaptedBlock, bare, bare_modules
from trimtab.surgery.names import known_adapter, seen_by, trained_beside
from trimtab.surgery.sharded import whole_tensors
from trimtab.surgery.watchers import WATCHERS, Watcher
from trimtab.surgery.wrappers import unwrapped, without_wrappers

# The attribute of a model that keeps how many batches each batch norm had counted before the adapters came.
_COUNTED_BEFORE = "_trimtab_counted_before"


@dataclass(frozen=True)
class Unfrozen:
    """The tensors of one module that are trained themselves, or counted."""

    entry: Adapted
    """The module as it would be if an adapter trained them; it hangs nowhere in the model."""
    adapter: methods.Method | None
    """The adapter that the module has beside them."""
    trained: bool
    """Whether there is more to it than statistics, which the model counts whether or not it is told to."""

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored values into the model: into the adapter what it has, into the module's own tensors the rest."""
        handle = self.entry.handle
        own = _tensors(handle) | ({} if self.adapter is None else self.adapter.stored_tensors())
        beside = self.adapter is not None and "weight" in self.adapter.stored_tensors()
        for name, value in tensors.items():
            if name == "weight" and isinstance(handle, WeightBase) and not beside:
                value = handle.as_stored(value)
            write(own[name], value)


def unfrozen(model: nn.Module, adapter: str) -> dict[str, Unfrozen]:
    """The modules of ``model`` with tensors of their own that are trained or counted beside ``adapter``, by name.

    Raises AdapterError if some tensor is trained that no entry of an adapter's folder can say.
    """
    beside = set(trained_beside(model))
    left = {
        id(parameter): without_wrappers(model, name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and without_wrappers(model, name) in beside
    }
    counted: dict[str, int] = getattr(model, _COUNTED_BEFORE, {})
    counting = {name for name, count in _counts(model) if count != counted.get(name, count)}
    if not left and not counting:
        return {}
    found: dict[str, Unfrozen] = {}
    seen: set[int] = set()
    said: set[int] = set()
    for name, module in seen_by(model, adapter):
        plain = unwrapped(bare(module))
        if id(plain) in seen or type(module) is HeldWeight:
            continue
        seen.add(id(plain))
        handle = _handle(module, plain)
        tensors = {} if handle is None else _tensors(handle)
        trained = [key for key, tensor in tensors.items() if id(tensor) in left]
        said.update(id(tensors[key]) for key in trained)
        made = None
        if handle is not None and isinstance(module, Adapted):
            made = _beside(name, module, handle, trained)
        elif handle is not None and (trained or name in counting):
            made = _full(name, handle, tensors, trained)
        elif name in counting:
            raise _cannot(f"{name}.running_mean", "its module is of no kind that an adapter can stand for")
        if made is not None:
            found[name] = Unfrozen(made, module.adapter if isinstance(module, Adapted) else None, bool(trained))
    if unsaid := [name for key, name in left.items() if key not in said]:
        raise _cannot(unsaid[0], "no module that can be called holds it as an ordinary tensor")
    return found


def require_savable(model: nn.Module) -> None:
    """Raise AdapterError if ``model`` trains a tensor that its adapter's folder will not be able to hold: before it is
    trained, and not after."""
    with whole_tensors(model):
        unfrozen(model, known_adapter(model, None, "training"))


def statistics(model: nn.Module, adapter: str, stored: Mapping[str, StoredAdapter]) -> dict[str, Unfrozen]:
    """The entries of ``stored``, for ``adapter``, that hold nothing but what modules of ``model`` count themselves,
    such as the statistics of a frozen batch norm."""
    found = {}
    for name, module in seen_by(model, adapter):
        entry = stored.get(name)
        if entry is None or entry.method != "full" or isinstance(module, Adapted):
            continue
        handle = bases.find(unwrapped(module), "module")
        buffers = (
            {key: one for key, one in _tensors(handle).items() if not isinstance(one, nn.Parameter)} if handle else {}
        )
        if handle is not None and entry.tensors.keys() <= buffers.keys():
            own = {key: buffers[key] for key in entry.tensors}
            found[name] = Unfrozen(_full(name, handle, own, []), None, trained=False)
    return found


def _handle(module: nn.Module, plain: nn.Module) -> Base | None:
    """A handle on the tensors that a module holds itself."""
    if isinstance(module, Adapted) and not isinstance(module, AdaptedBlock):
        return module.handle
    return bases.find(plain, "module")


def _tensors(handle: Any) -> dict[str, Tensor]:
    """The tensors that the module of ``handle`` holds itself, by the names that method ``full`` gives them."""
    if not isinstance(handle, WeightBase):
        tensors: dict[str, Tensor] = handle.tensors()
        return tensors
    named = {"weight": handle.parameter, "bias": handle.stored_bias}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _full(name: str, handle: Base, tensors: dict[str, Tensor], trained: list[str]) -> Adapted:
    """The module as an adapter of method ``full`` would train it."""
    if not name:
        raise _cannot(trained[0] if trained else "the model", "it hangs on the model itself, and not on a module in it")
    every = all(key in trained for key, tensor in tensors.items() if isinstance(tensor, nn.Parameter))
    # What a module counts while it trains belongs to what it learned.
    chosen = [key for key, tensor in tensors.items() if key in trained or not isinstance(tensor, nn.Parameter)]
    kind = methods.method_class("full")
    options = methods.options_class("full")(**({} if every and trained else {"tensors": tuple(chosen)}))
    return Adapted.around(handle, kind.class_for(handle)(handle, options), "full", 0)


def _beside(name: str, module: Adapted, handle: Base, trained: list[str]) -> Adapted | None:
    """An adapted module with tensors that are trained beside its adapter, as one whose adapter trains them, too; None
    if there are none, or copies of the adapter's stand in for all of them."""
    adapter = module.adapter
    mine = adapter.stored_tensors()
    options: Any = adapter.options
    # Where only rows of a weight have a copy, the weight itself is trained beside it.
    copied = adapter.trains_base and not getattr(options, "rows", None)
    trained = [key for key in trained if key not in mine or not (copied or key == "bias")]
    if not trained:
        return None
    if copied and options.tensors is not None:
        options = options.model_copy(update={"tensors": (*options.tensors, *trained)})
    elif trained == ["bias"] and not adapter.trains_base and "bias" in type(options).model_fields:
        options = options.model_copy(update={"bias": True})
    else:
        where = name if isinstance(handle, bases.HeldBase) else f"{name}.{trained[0]}"
        raise _cannot(where, f"the adapter of method {module.method} on this module is trained beside it")
    if not isinstance(handle, WeightBase):
        made = type(adapter)(handle, options)
        with torch.no_grad():
            for key, tensor in made.stored_tensors().items():
                tensor.copy_(mine.get(key, tensor))
        return Adapted.around(handle, made, module.method, module.rule)
    # A copy that holds the same tensors, and those beside them.
    made = copy.copy(adapter)
    made._parameters, made.options = dict(adapter._parameters), options
    own = _tensors(handle)
    for key in trained:
        value = handle.weight() if key == "weight" else own[key]
        made.register_parameter(key, nn.Parameter(value.detach().to(adapter.dtype, copy=True)))
    return Adapted.around(handle, made, module.method, module.rule)


def _cannot(name: str, why: str) -> AdapterError:
    return AdapterError(
        f"{name} is trained or counted itself, beside the adapters, and their folder cannot say so: {why}. Freeze it "
        "(requires_grad_(False), eval()) before training; or save the whole model: trimtab.merge(model), then "
        "save_pretrained or torch.save(model.state_dict(), ...)"
    )


def _counts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """How many batches each batch norm has counted itself."""
    if not any(isinstance(module, _NormBase) for module in model.modules()):
        return
    for name, module in ((name, bare(module)) for name, module in bare_modules(model)):
        count = module.num_batches_tracked if isinstance(module, _NormBase) else None
        if count is not None and not count.is_meta:
            yield name, int(count)


def _remember(model: nn.Module) -> None:
    vars(model).setdefault(_COUNTED_BEFORE, dict(_counts(model)))


def _forget(model: nn.Module) -> None:
    vars(model).pop(_COUNTED_BEFORE, None)


WATCHERS.append(Watcher(_remember, _forget))
