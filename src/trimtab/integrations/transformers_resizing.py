"""A vocabulary that changes after the adapters came: transformers' ``resize_token_embeddings`` and ``tie_weights``.

Both look for layers of torch and for parameters under their names, and find adapted modules there. So while a model has
adapters, its own two methods are called on the bare modules; afterwards the trained tensors are made to fit. The tokens
that stayed keep what was learned for them; on new ones an adapter does nothing yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from trimtab.errors import SurgeryError
from trimtab.surgery.adapted import Adapted, AdaptedLayer, AdaptedModule, AdaptedParameter, owners

_METHODS = ("resize_token_embeddings", "tie_weights")


def attached(model: nn.Module) -> None:
    """Have the model's own methods pass its adapters by."""
    for module, name in _resizable(model):
        # A partial object, and no bound method: it is copied and pickled with the model, and belongs to the copy then.
        module.__dict__[name] = partial(_on_bare_modules, module, name)


def removed(model: nn.Module) -> None:
    """Undo ``attached``."""
    for module, name in _resizable(model):
        if isinstance(module.__dict__.get(name), partial) and module.__dict__[name].func is _on_bare_modules:
            del module.__dict__[name]


def _resizable(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The models in ``model`` that have these methods, with the name of each."""
    for module in model.modules():
        if not isinstance(module, Adapted):
            yield from ((module, name) for name in _METHODS if callable(getattr(type(module), name, None)))


def _on_bare_modules(model: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """``model.method(*args, **kwargs)`` as if the model had no adapters, which then are made to fit.

    Raises SurgeryError, before anything is changed, if the vocabulary changes under an adapter that cannot follow.
    """
    places = [place for place in owners(model) if isinstance(place[3], (AdaptedLayer, AdaptedModule))]
    places = [place for place in places if not isinstance(place[3], AdaptedParameter)]
    ratios = {}
    if method == "resize_token_embeddings" and (args or kwargs):
        ratios = {id(entry.adapter): entry.adapter.ratio_on(entry.handle) for entry in _on_the_vocabulary(model)}
    for _, parent, attribute, adapted in places:
        parent._modules[attribute] = adapted.base  # type: ignore[assignment]
    try:
        result = getattr(type(model), method)(model, *args, **kwargs)
    finally:
        for _, parent, attribute, adapted in places:
            adapted.base = parent._modules[attribute]  # type: ignore[assignment]
            parent._modules[attribute] = adapted
    for adapted in {id(place[3]): place[3] for place in places}.values():
        for entry in adapted.every_entry():  # type: ignore[operator]
            entry.adapter.refit(entry.handle, ratios.get(id(entry.adapter)))
    return next((adapted for _, _, _, adapted in places if adapted.base is result), result)


def _on_the_vocabulary(model: Any) -> list[Adapted]:
    """The adapters of embedding and output head, each with its layer. Raises SurgeryError if one cannot follow."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    adapted = [entry for layer in layers if isinstance(layer, Adapted) for entry in layer.every_entry()]
    for entry in adapted:
        if not entry.adapter.can_refit:
            raise SurgeryError(
                f"resize_token_embeddings: an adapter of method {entry.method} sits on the vocabulary, and its matrix "
                "is laid out for the present number of tokens. Nothing was changed; merge or detach first, or resize "
                "before the adapters are attached"
            )
    return adapted
