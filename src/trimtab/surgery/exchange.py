"""Puts other adapters into the places of those that a model carries under one name, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from trimtab.bases import Base
from trimtab.methods import Method
from trimtab.surgery.adapted import Adapted, AdaptedParameter, adapted_modules
from trimtab.surgery.carrier import Slot
from trimtab.surgery.holding import hold, let_go


class Successor(NamedTuple):
    """What takes the place of an adapter on one module."""

    handle: Base
    method: str
    adapter: Method


class _Place(NamedTuple):
    module: Adapted
    old: tuple[Slot, Method]
    new: tuple[Slot, Method]


class Exchange:
    """Other adapters for some of the modules that one adapter of a model has.

    Args:
        model: the model.
        name: of the adapter.
        new: by the name of a module, what takes the adapter's place there.
    """

    def __init__(self, model: nn.Module, name: str, new: Mapping[str, Successor]) -> None:
        self._name = name
        self._places = []
        for place, module in adapted_modules(model):
            if place in new:
                slot, (handle, method, adapter) = module.adapter_slots[name], new[place]
                put = slot._replace(handle=handle, method=method)
                self._places.append(_Place(module, (slot, module.entry_of(name).adapter), (put, adapter)))

    def make(self) -> None:
        """Put the new adapters in."""
        for place in self._places:
            place.new[1].train(place.old[1].training)
            self._put(place.module, *place.new)

    @contextmanager
    def made(self) -> Iterator[None]:
        """A context in which the new adapters are in their places."""
        try:
            for place in self._places:
                self._put(place.module, *place.new)
            yield
        finally:
            for place in self._places:
                self._put(place.module, *place.old)

    def _put(self, module: Adapted, slot: Slot, adapter: Method) -> None:
        module.put_adapter(self._name, slot, adapter)
        module.switch_adapter(module.active_name)  # which kind of module it is may be another
        if isinstance(module, AdaptedParameter):  # so may be whether it shows a bias
            let_go(module.base.holder, module.base.attribute)
            hold(module.base.holder, module.base.attribute, module)
