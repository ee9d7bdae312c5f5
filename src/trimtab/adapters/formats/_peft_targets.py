"""Which modules of a model PEFT would adapt by a configuration (``target_modules``): by the ends of their names, and by
the numbers of their layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from trimtab.adapters.formats._peft_own import is_declared
from trimtab.surgery.adapted import bare


def left_out(config: Mapping[str, Any], modules: Mapping[str, nn.Module], stored: Collection[str]) -> list[str]:
    """Those ``modules``, of a kind that something is ``stored`` of and in the same stack of layers, that the
    configuration names and nothing is stored of. (Of another stack an adapter need not know: it may have been trained
    on the text model alone, and be loaded into one that sees, too.) None where modules are named by a pattern, which is
    not run: a downloaded one may take for ever."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return []
    adapted = [bare(modules[name]) for name in stored if name in modules]
    kinds, seen = {type(module) for module in adapted}, {id(module) for module in adapted}
    stacks, ends = {_stack(name) for name in stored}, {*map(str, targets)}
    found = []
    for name, module in modules.items():
        meant = ends_with(name, ends) and not _is_excluded(config, name) and _in_layers(config, name)
        if meant and _stack(name) in stacks and type(bare(module)) in kinds and id(bare(module)) not in seen:
            seen.add(id(bare(module)))
            found.append(name)
    return found


def _stack(name: str) -> str:
    """``model.layers`` of ``model.layers.3.mlp``."""
    parts = name.split(".")
    return ".".join(parts[: next((at for at, part in enumerate(parts) if part.isdecimal()), 0)])


def ends_with(name: str, ends: Collection[str]) -> bool:
    """Whether ``name``, or what follows one of its dots, is among ``ends``: as PEFT compares names."""
    parts = name.split(".")
    return any(".".join(parts[place:]) in ends for place in range(len(parts)))


def _is_excluded(config: Mapping[str, Any], name: str) -> bool:
    excluded = config.get("exclude_modules") or []
    whole = is_declared(config, name, "weight")  # by modules_to_save
    return whole or not isinstance(excluded, list) or ends_with(name, [*map(str, excluded)])


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    """By ``layers_to_transform``: the number behind the name of the layers' list, or the first number."""
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if wanted is None:
        return True
    lists = [patterns] if isinstance(patterns, str) else patterns
    parts = name.split(".")
    behind = pairwise(parts)
    number = next((int(part) for before, part in behind if part.isdecimal() and (not lists or before in lists)), None)
    return number in (wanted if isinstance(wanted, list) else [wanted])
