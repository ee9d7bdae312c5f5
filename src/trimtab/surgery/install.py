"""Puts adapters into a model under a name, switches between them, and takes them out again."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from trimtab.errors import SurgeryError
from trimtab.surgery.adapted import Adapted, AdaptedParameter, bare, carriers, owners
from trimtab.surgery.build import build_adapters
from trimtab.surgery.carrier import Slot, place_of
from trimtab.surgery.holding import hold, let_go
from trimtab.surgery.plan import Target
from trimtab.surgery.references import replace_references
from trimtab.surgery.sharded import follow_trained, keep_alike
from trimtab.surgery.watchers import WATCHERS
from trimtab.surgery.wrappers import without_wrappers

# The attribute of a model that keeps the names of what was trainable before its adapters came.
_TRAINABLE_BEFORE = "_trimtab_trainable_before"


def install(model: nn.Module, targets: list[Target], name: str) -> None:
    """Put an adapter onto every target under ``name``, which is new, and make it the active one. All else is frozen.
    The model is not changed before all adapters are built."""
    require_no_rows(model)
    adapters = build_adapters(targets)
    require_shapes(model)
    there = {id(bare(module)): module for module in carriers(model)}
    if not there:
        # A shared parameter is noted under all its names: if a merge unties it, both are trainable where the one was.
        every = model.named_parameters(remove_duplicate=False)
        before = tuple(without_wrappers(model, key) for key, parameter in every if parameter.requires_grad)
        setattr(model, _TRAINABLE_BEFORE, before)
    order = 1 + max((slot.order for module in there.values() for slot in module.adapter_slots.values()), default=-1)
    switch(model, None)
    model.requires_grad_(False)
    replacement: dict[int, nn.Module] = {}
    held = []
    for target, adapter in zip(targets, adapters, strict=True):
        slot = Slot(target.base, target.method, target.rule, place_of(name), order)
        if (module := there.get(id(target.module))) is None:
            module = replacement[id(target.module)] = Adapted.kind_for(target.base)(name, slot, adapter)
        else:
            module.put_adapter(name, slot, adapter)
        adapter.train(module.training)
        module.put_hook()
        if isinstance(module, AdaptedParameter):
            held.append(module)
    for _, parent, attribute, child in list(owners(model)):
        if id(child) in replacement:
            parent._modules[attribute] = replacement[id(child)]
    replace_references(model, replacement)
    for module in held:
        hold(module.base.holder, module.base.attribute, module)
    switch(model, name)
    keep_alike(model, adapters)
    for watcher in WATCHERS:
        watcher.attached(model)


def switch(model: nn.Module, name: str | None) -> None:
    """Make the adapter ``name`` the active one in all of ``model``."""
    for module in carriers(model):
        module.switch_adapter(name)


def remove_adapters(model: nn.Module) -> None:
    """Put every frozen module back in its place, and give the parameters their old ``requires_grad``."""
    require_no_rows(model)
    _put_back(model, lambda module: True)
    before = set(getattr(model, _TRAINABLE_BEFORE, ()))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(without_wrappers(model, name) in before)
    if hasattr(model, _TRAINABLE_BEFORE):
        delattr(model, _TRAINABLE_BEFORE)
    follow_trained(model)
    for watcher in WATCHERS:
        watcher.removed(model)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter ``name`` alone. If it was the active one, none is; if it was the last one, the model is as it
    was before the first."""
    require_no_rows(model)
    modules = list(carriers(model))
    if all(module.adapter_slots.keys() == {name} for module in modules):
        remove_adapters(model)
        return
    if any(module.active_name == name for module in modules):
        switch(model, None)
        follow_trained(model)
    _put_back(model, lambda module: module.adapter_slots.keys() == {name})
    for module in carriers(model):
        if name in module.adapter_slots:
            module.drop_adapter(name)


def require_shapes(model: nn.Module) -> None:
    """Raise SurgeryError for a model with lazy layers that have seen no batch yet."""
    waiting = [name for name, one in model.named_parameters() if isinstance(one, nn.parameter.UninitializedParameter)]
    if waiting:
        raise SurgeryError(
            f"{waiting[0]} has no shape before its lazy layer has seen a batch ({len(waiting)} such parameters): call "
            "the model once, and attach then. The model is unchanged"
        )


def require_no_rows(model: nn.Module) -> None:
    """Raise SurgeryError inside of ``per_row``, whose rows have adapters that must not come or go meanwhile."""
    if any(module.row_groups() is not None for module in carriers(model)):
        raise SurgeryError(
            "adapters cannot be attached, loaded under a new name, deleted, merged, converted, combined or detached "
            "inside of trimtab.per_row: leave that context first"
        )


def _put_back(model: nn.Module, chosen: Callable[[Adapted], bool]) -> None:
    """Put the frozen modules in the ``chosen`` adapted ones back in their places."""
    frozen = {}
    places = list(owners(model))  # kept, so that no id is another module's before all is replaced
    for _, parent, attribute, child in places:
        if not isinstance(child, Adapted) or not chosen(child):
            continue
        if isinstance(child, AdaptedParameter):
            let_go(parent, child.base.attribute)
        else:
            parent._modules[attribute] = frozen[id(child)] = child.remove()
    replace_references(model, frozen)
