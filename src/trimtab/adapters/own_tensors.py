"""Tensors of a model's own in a stored adapter, as the model at hand has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import methods
from trimtab.adapters.record import StoredAdapter
from trimtab.bases import can_be_called
from trimtab.errors import AdapterError
from trimtab.ops.spread import whole
from trimtab.surgery.adapted import bare


def as_held_in(
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
        own = entry.in_layout and methods.method_class(entry.method).trains_base
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
        if weight is None or not methods.method_class(entry.method).trains_base or "weight" not in entry.tensors:
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


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, as far as the coarser of their two dtypes can tell."""
    one, other = one.detach().cpu(), other.detach().cpu()
    if one.shape != other.shape or not (one.is_floating_point() and other.is_floating_point()):
        return one.shape == other.shape and torch.equal(one, other)
    if one.dtype == other.dtype:
        return torch.equal(one, other)
    limits = [torch.finfo(tensor.dtype) for tensor in (one, other)]
    # Each of the two may have been rounded on its own, from a third: by half a unit of its last place at most, which
    # among the smallest numbers of float16 is that of its smallest one.
    tiny = max(limit.smallest_normal * limit.eps for limit in limits)
    return torch.allclose(one.double(), other.double(), rtol=max(limit.eps for limit in limits), atol=tiny)


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
