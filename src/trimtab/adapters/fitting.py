"""Stored adapters as the model at hand has them: under its names, on its parameters, with the tensors of its modules
and the options of its layers.

Names: a model's classes may have been rearranged since, or the adapter was saved with something around the model.
Parameters: which one an adapter of PEFT's ``target_parameters`` is for, only the model tells, as PEFT wraps a module
once for each of its parameters in turn, the last one outermost (``experts``, ``experts.base_layer``). Before
transformers 5 experts were modules of their own: the old ``experts.3.gate_proj`` and ``experts.3.up_proj`` became rows
of one ``experts.gate_up_proj``. The fused update is exact: the As stand one below the other, and each B in the rows and
columns that are its own.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab import bases
from trimtab.adapters.record import StoredAdapter, nearly_equal
from trimtab.adapters.safe_read import shown
from trimtab.bases import can_be_called
from trimtab.errors import AdapterError, PlanError, nearest
from trimtab.methods import lora
from trimtab.ops.spread import whole
from trimtab.surgery.adapted import Adapted, bare, bare_modules

BASE_LAYER = ".base_layer"
# The parameter of a stack, and the modules of before that its rows come from, in order.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
    "up_proj": (("up_proj",),),
}
_SEPARATE = re.compile(r"(.+)\.(\d+)\.(\w+)")
# What stands in front of every name where a model was saved inside of DataParallel, or of PEFT's model.
_AROUND = ("module.", "base_model.model.")


def fitted_to(
    model: nn.Module, known: Mapping[str, nn.Module], place: Path, stored: Mapping[str, StoredAdapter]
) -> dict[str, StoredAdapter]:
    """What is ``stored`` in ``place`` as ``model`` has it, whose modules are ``known`` by every name.

    Raises AdapterError, which names the place, for what cannot be on this model.
    """
    places = Places(dict(bare_modules(model)))
    stored = _on_parameters(places, as_named_in(model, places, stored))
    found = {}
    for name, entry in _as_held_in(place, model, places.known, stored).items():
        module = known.get(name)
        handle = module.handle if isinstance(module, Adapted) else None if module is None else bases.find(module)
        try:
            found[name] = entry.fitted(handle)
        except PlanError as error:
            raise AdapterError(f"{place}: this adapter does not fit the model: {name}: {error}") from None
    if missing := [name for name in found if name not in known or not name]:
        near = nearest(missing[0], known)
        hint = f" The model has, for instance, {', '.join(near)}." if near else ""
        raise AdapterError(
            f"{place}: this adapter was made for another model: {len(missing)} of its {len(found)} modules are "
            f"not in this one, such as {shown(missing[0])}.{hint} The model is unchanged"
        )
    return found


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


def _on_parameters(places: Places, stored: Mapping[str, StoredAdapter]) -> dict[str, StoredAdapter]:
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


def _as_held_in(
    place: Path, model: Any, known: Mapping[str, nn.Module], stored: Mapping[str, StoredAdapter]
) -> dict[str, StoredAdapter]:
    """``stored`` with tensors in the modules that train them; ``known``: the modules of ``model`` by name.

    What lies in a list of parameters belongs to the module around it. What was stored beside an adapter, because
    embeddings had been resized, and is no other than the model's own, is left out.

    Raises AdapterError if an embedding was stored with more rows than the model's.
    """
    _check_rows(place, model, known, stored)
    found: dict[str, StoredAdapter] = {}
    for name, entry in stored.items():
        if entry.beside and name in known and _are_the_same(entry.tensors, bare(known[name])):
            continue
        module, prefix = name, ""
        own = entry.in_layout and entry.method_class.trains_base
        while own and module in known and not can_be_called(known[module]) and "." in module:
            module, _, last = module.rpartition(".")
            prefix = f"{last}.{prefix}"
        found[module] = _joined(found.get(module), entry, prefix) if prefix or module in found else entry
    return _with_ties(known, found)


def _with_ties(known: Mapping[str, nn.Module], stored: Mapping[str, StoredAdapter]) -> dict[str, StoredAdapter]:
    """``stored`` with rows of a table also on the modules that share it, of which PEFT says nothing; and what was
    trained apart although it is shared, marked as that."""
    found = dict(stored)
    first: dict[int, str] = {}
    for name, entry in stored.items():
        weight = bare(known[name])._parameters.get("weight") if name in known else None
        if weight is None or not entry.method_class.trains_base or "weight" not in entry.tensors:
            continue
        if entry.in_layout and getattr(entry.options, "rows", None):
            tied = [other for other, module in known.items() if bare(module)._parameters.get("weight") is weight]
            found = {**dict.fromkeys(tied, entry), **found}
        twin = first.setdefault(id(weight), name)
        mine, theirs = entry.tensors["weight"], stored[twin].tensors["weight"]
        if mine.shape != theirs.shape or not torch.equal(mine, theirs):
            found[name] = replace(found[name], apart=True)
    return found


def _joined(one: StoredAdapter | None, entry: StoredAdapter, prefix: str) -> StoredAdapter:
    tensors = {f"{prefix}{name}": tensor for name, tensor in entry.tensors.items()}
    if one is not None:
        tensors = {**one.tensors, **tensors}
    return replace(entry, tensors=tensors, options=entry.options.model_copy(update={"tensors": tuple(sorted(tensors))}))


def _are_the_same(tensors: Mapping[str, Tensor], module: nn.Module) -> bool:
    own = module.state_dict()
    return all(name in own and nearly_equal(tensor, whole(own[name])) for name, tensor in tensors.items())


def _check_rows(place: Path, model: Any, known: Mapping[str, nn.Module], stored: Mapping[str, StoredAdapter]) -> None:
    """Raise AdapterError if an embedding or an output head was stored with more or fewer tokens than the model's."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    vocabulary = []
    for getter in getters:
        try:
            vocabulary.append(bare(getter()) if getter is not None else None)
        except (NotImplementedError, AttributeError):
            continue
    for name, entry in stored.items():
        if getattr(entry.options, "rows", None):
            continue
        module: Any = bare(known[name]) if name in known else None
        if not any(module is one and module is not None for one in vocabulary):
            continue
        rows = getattr(module, "num_embeddings", None) or getattr(module, "out_features", None)
        theirs = entry.tensors.get("weight", entry.base)
        if rows is not None and theirs is not None and theirs.dim() == 2 and len(theirs) != rows:
            raise AdapterError(
                f"{place}: {name} was stored with {len(theirs)} tokens, and the model has {rows}: its vocabulary was "
                f"resized before the training. Resize the model first: model.resize_token_embeddings({len(theirs)}). "
                "The model is unchanged"
            )
