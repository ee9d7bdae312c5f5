"""Names of modules in a stored adapter that the model has under other names: its classes were rearranged since, or the
adapter was saved with something around the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import TypeVar

from torch import nn

# What stands in front of every name where a model was saved inside of DataParallel, or of PEFT's model.
_AROUND = ("module.", "base_model.model.")

Entry = TypeVar("Entry")


def as_named_in(model: nn.Module, known: Container[str], stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """``stored`` under the names that ``model`` has; ``known``: these. A name that leads nowhere stays as it is.

    A name that the model does not have is tried without what stood around the model, and by the renamings with which
    transformers reads checkpoints of before, as PEFT does (LLaVA's language model moved in 4.52, for instance).
    """
    if all(name in known for name in stored):
        return dict(stored)
    renamings = list(_renamings(model))
    names = {name: next((other for other in _others(name, renamings) if other in known), name) for name in stored}
    if len(set(names.values())) < len(names):  # two modules would become one: so these renamings are not what happened
        return dict(stored)
    return {names[name]: entry for name, entry in stored.items()}


def _others(name: str, renamings: list[Callable[[str], str]]) -> Iterator[str]:
    """The names that a module stored as ``name`` may have now."""
    yield name
    while around := next((one for one in _AROUND if name.startswith(one)), ""):
        name = name.removeprefix(around)
        yield name
    for renamed in renamings:
        yield renamed(name)


def _renamings(model: nn.Module) -> Iterator[Callable[[str], str]]:
    """The ways in which a model of transformers renames what it reads."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    own: Mapping[str, str] = (
        getattr(model, "_checkpoint_conversion_mapping", None) or {}
    )  # code that comes with a model

    def by_pattern(name: str) -> str:
        for pattern, new in own.items():
            renamed, times = re.subn(pattern, new, name)
            if times:
                return renamed
        return name

    if own:
        yield by_pattern
    if isinstance(model, PreTrainedModel):
        steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]

        def by_transformers(name: str) -> str:
            key = f"{name}.weight"  # the renamings are of tensors
            for step in steps:
                key = step.rename_source_key(key)[0]
            return key.removesuffix(".weight")

        yield by_transformers
