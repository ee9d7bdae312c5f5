"""Names of modules in a stored adapter that the model has under other names: its classes were rearranged since, or the
adapter was saved with something around the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from trimtab import bases
from trimtab.adapters.parameters import Places
from trimtab.adapters.record import StoredAdapter

# What stands in front of every name where a model was saved inside of DataParallel, or of PEFT's model.
_AROUND = ("module.", "base_model.model.")


def as_named_in(model: nn.Module, places: Places, stored: Mapping[str, StoredAdapter]) -> dict[str, StoredAdapter]:
    """``stored`` under the names that ``model`` has; ``places``: these. A name that leads nowhere stays as it is.

    A name that the model does not have is tried without what stood around the model, and by the renamings with which
    transformers reads checkpoints of before, as PEFT does (LLaVA's language model moved in 4.52, for instance). And
    where PEFT names a module of which one weight is adapted (``nn.MultiheadAttention``), this is that weight's name.
    """
    known = places.known
    if not all(name in places for name in stored):
        renamings = list(_renamings(model))
        names = {name: next((other for other in _others(name, renamings) if other in places), name) for name in stored}
        if len(set(names.values())) == len(names):  # else two would become one: these renamings are not what happened
            stored = {names[name]: entry for name, entry in stored.items()}
    return {_held(name, known[name], entry) if name in known else name: entry for name, entry in stored.items()}


def _held(name: str, module: nn.Module, entry: StoredAdapter) -> str:
    """The name of the weight that hangs on ``module``, for the low-rank update of a module that is no layer itself. A
    module of which nothing is known is left out: PEFT's update beside it may be another thing than one inside."""
    held = [one for one in bases.held_weights(module) if (base := bases.find(one)) is None or not base.is_fallback]
    is_update = entry.in_layout and "A" in entry.tensors and bases.find(module) is None
    return f"{name}.{held[0].attribute}" if is_update and len(held) == 1 else name


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

    # Code that comes with a model has it as an attribute, by patterns.
    own: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}

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
