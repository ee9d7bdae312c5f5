"""Stored adapters whose place is a parameter of the model: those that PEFT made with ``target_parameters``, and those
of experts that were modules of their own before transformers 5.

Which parameter one of PEFT's is for, only the model tells: PEFT wraps a module once for each of its parameters in turn,
the last one outermost (``experts``, ``experts.base_layer``). The old experts ``experts.3.gate_proj`` and
``experts.3.up_proj`` became rows of one ``experts.gate_up_proj``. The fused update is exact: the As stand one below the
other, and each B in the rows and columns that are its own.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from trimtab import bases
from trimtab.adapters.record import StoredAdapter
from trimtab.errors import AdapterError
from trimtab.methods import lora
from trimtab.surgery.adapted import bare

BASE_LAYER = ".base_layer"
# The parameter of a stack, and the modules of before that its rows come from, in order.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
    "up_proj": (("up_proj",),),
}
_SEPARATE = re.compile(r"(.+)\.(\d+)\.(\w+)")


class _Part(NamedTuple):
    stack: str
    expert: int
    place: int
    """Which of the parts of a stack's rows it is,"""
    parts: int
    """of so many."""


class Places:
    """The names under which an adapter may be stored for a model with the modules ``known``."""

    def __init__(self, known: Mapping[str, nn.Module]) -> None:
        self.known = {name: bare(module) for name, module in known.items()}

    def __contains__(self, name: object) -> bool:
        return str(name) in self.known or self.wrapped(str(name)) in self.known or self.part(str(name)) is not None

    @staticmethod
    def wrapped(name: str) -> str:
        """The module that PEFT wrapped to give it the name ``name``."""
        while name.endswith(BASE_LAYER):
            name = name.removesuffix(BASE_LAYER)
        return name

    def part(self, name: str) -> _Part | None:
        """What ``name`` is a part of, if it is an expert's module of before."""
        if name in self.known or (found := _SEPARATE.fullmatch(name)) is None:
            return None
        holder, expert, leaf = found[1], int(found[2]), found[3]
        for parameter, choices in _PARTS.items():
            stack = self.known.get(f"{holder}.{parameter}")
            base = None if stack is None else bases.find(stack)
            if base is None or not base.stack or expert >= base.stack[0]:
                continue
            for leaves in choices:
                if leaf in leaves:
                    return _Part(f"{holder}.{parameter}", expert, leaves.index(leaf), len(leaves))
        return None


def on_parameters(places: Places, stored: Mapping[str, StoredAdapter]) -> dict[str, StoredAdapter]:
    """``stored`` with each adapter of a parameter under that parameter's name. A name that leads nowhere stays.

    Raises AdapterError for parts of a stack that do not fit together.
    """
    found: dict[str, StoredAdapter] = {}
    fused: dict[str, dict[_Part, StoredAdapter]] = defaultdict(dict)
    for name, entry in stored.items():
        if (part := places.part(name)) is not None:
            fused[part.stack][part] = entry
        else:
            new, on_it = _placed(places, name, entry)
            found[new] = on_it
    for stack, parts in fused.items():
        base = bases.find(places.known[stack])
        assert base is not None
        found[stack] = _fused(stack, base, parts)
    return found


def _placed(places: Places, name: str, entry: StoredAdapter) -> tuple[str, StoredAdapter]:
    holder = places.wrapped(name)
    module = places.known.get(holder)
    if isinstance(module, bases.HeldWeight):
        return name, replace(entry, options=entry.parameters.get(module.attribute, entry.options))
    if module is None or not entry.parameters:
        return name, entry
    own = [parameter for parameter in module._parameters if parameter in entry.parameters]
    depth = (len(name) - len(holder)) // len(BASE_LAYER)
    if depth < len(own):
        parameter = own[len(own) - 1 - depth]
        entry = replace(entry, options=entry.parameters[parameter])
    else:
        parameter = "weight"
    held = f"{holder}.{parameter}"
    return (held if held in places.known else holder), entry


def _fused(stack: str, base: bases.WeightBase, parts: Mapping[_Part, StoredAdapter]) -> StoredAdapter:
    """One adapter of a stack from those of its experts' parts."""
    (experts,), (out_features, in_features) = base.stack, base.shape
    first = next(iter(parts.values()))
    widths: dict[int, int] = defaultdict(int)
    for part, entry in parts.items():
        options, rows = entry.options, out_features // part.parts
        if not isinstance(options, lora.Options) or type(options) is not type(first.options):
            raise AdapterError(
                f"{stack}: its experts have adapters of several methods; merge them where they were made"
            )
        expected = {"A": [options.rank, in_features], "B": [rows, options.rank]}
        expected |= {"magnitude": [rows]} if options.magnitude else {}
        got = {key: list(value.shape) for key, value in entry.tensors.items()}
        if got != expected:
            raise AdapterError(f"{stack}, expert {part.expert}: expected tensors {expected}, got {got}")
        widths[part.place] = max(widths[part.place], options.rank)
    rank = sum(widths.values())
    assert isinstance(first.options, lora.Options)
    scale = first.options.scale
    given = first.tensors["A"]
    a = given.new_zeros(experts, rank, in_features)
    b = given.new_zeros(experts, out_features, rank)
    magnitude = base.squared_norms("output").sqrt().to(given) if first.options.magnitude else None
    for part, entry in parts.items():
        assert isinstance(entry.options, lora.Options)
        start, rows = sum(width for place, width in widths.items() if place < part.place), out_features // part.parts
        columns = slice(start, start + entry.options.rank)
        a[part.expert, columns] = entry.tensors["A"]
        mine = slice(part.place * rows, (part.place + 1) * rows)
        b[part.expert, mine, columns] = entry.tensors["B"] * (entry.options.scale / scale)
        if magnitude is not None:
            magnitude[part.expert, mine] = entry.tensors["magnitude"]
    tensors = {"A": a, "B": b} | ({} if magnitude is None else {"magnitude": magnitude})
    alpha = scale * (math.sqrt(rank) if first.options.rank_stabilised else rank)
    options = first.options.model_copy(update={"rank": rank, "alpha": alpha})
    return StoredAdapter(first.method, options, tensors)
