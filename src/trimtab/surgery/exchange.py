"""Puts adapted modules into the places of others, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from trimtab import bases
from trimtab.methods import Method
from trimtab.surgery.adapted import Adapted, AdaptedLayer, AdaptedParameter, adapted_modules, owners
from trimtab.surgery.holding import hold, let_go
from trimtab.surgery.references import replace_references


class Exchange:
    """Other adapters for some modules of a model.

    Args:
        model: the model.
        new: by the id of an adapted module of the model, the one that takes its place; both on one frozen module.
    """

    def __init__(self, model: nn.Module, new: Mapping[int, Adapted]) -> None:
        self._model = model
        self._pairs = [(module, new[id(module)]) for _, module in adapted_modules(model) if id(module) in new]

    @staticmethod
    def around(module: Adapted, adapter: Method) -> Adapted:
        """An adapted module with ``adapter``, a LoRA, on the frozen module of ``module``."""
        handle = module.handle if isinstance(module, AdaptedLayer) else bases.find(module.base)
        assert handle is not None
        made = Adapted.around(handle, adapter, "lora", module.rule)
        made.adapters_disabled = module.adapters_disabled
        return made

    def make(self) -> None:
        """Put the new modules in."""
        for old, new in self._pairs:
            new.training = old.training
            new.adapter.train(old.adapter.training)
        self._put(self._pairs)

    @contextmanager
    def made(self) -> Iterator[None]:
        """A context in which the new modules are in their places."""
        try:
            self._put(self._pairs)
            yield
        finally:
            self._put([(new, old) for old, new in self._pairs])

    def _put(self, pairs: list[tuple[Adapted, Adapted]]) -> None:
        placed: dict[int, nn.Module] = {id(old): new for old, new in pairs}
        for _, parent, attribute, child in list(owners(self._model)):
            if id(child) in placed and not isinstance(child, AdaptedParameter):
                parent._modules[attribute] = placed[id(child)]
        replace_references(self._model, placed)
        for old, new in pairs:
            if isinstance(old, AdaptedParameter) and isinstance(new, AdaptedParameter):
                let_go(old.base.holder, old.base.attribute)
                hold(new.base.holder, new.base.attribute, new)
