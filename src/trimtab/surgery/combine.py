"""Makes one adapter of several that a model carries."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import nn

from trimtab.errors import SurgeryError, did_you_mean
from trimtab.surgery.adapted import adapted_modules, bare, bare_modules
from trimtab.surgery.changed_weights import changed_weights
from trimtab.surgery.conversion_report import CombinationReport
from trimtab.surgery.install import install, remove_adapter, switch
from trimtab.surgery.names import active_adapter, entries, known_adapter, require_new_name
from trimtab.surgery.sums import How, Place, Source, Wishes, sums, target
from trimtab.surgery.wrappers import synchronised_by, unwrapped

_RANK = 32  # where no combined adapter has one
_OF_LINEAR: Mapping[str, Any] = {"rank": None, "density": None, "seed": 0}


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    how: How = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> CombinationReport:
    """Make the adapter ``name`` of those that ``weights`` names, each with its weight, and make it the active one.

    The combined adapters stay beside it. What is combined are the changes of the weights, ``dW_i = W'_i - W``, whatever
    method makes them:

    - ``linear``: ``sum_i w_i dW_i``, exactly. LoRA and DoRA in any mix are a DoRA adapter (LoRA, where none has
      magnitudes), whose rank is the sum of theirs (`trimtab.ops.combination`); MoRA with MoRA of one size is MoRA; with
      full, it is full. Modules that are combined from LoRA and MoRA, or from MoRA with magnitudes, have no such sum.
    - ``svd``: the same sum of any methods, as the best plain LoRA of ``rank``.
    - ``ties``: each dW_i keeps its largest numbers, a share of ``density``; of what is left the signs are elected
      (arXiv 2306.01708).
    - ``dare_linear``, ``dare_ties``: each dW_i keeps numbers drawn by ``seed``, a share of ``density``, divided by it
      (arXiv 2311.03099); then as ``linear`` and ``ties``.

    All but ``linear`` are plain LoRA of ``rank``, and the report has the error of that. Biases, and modules that are
    trained as a whole, are combined linearly and exactly in every way.

    Args:
        model: the model that carries the adapters.
        weights: name of an adapter -> its weight, of any sign; they need not add up to 1.
        name: of the new adapter.
        how: as above.
        rank: of the LoRA; None: the largest sum of the ranks that meet in a module, or 32 where there are none.
        density: the share of the numbers that is kept by ``ties`` and ``dare_*``; None: 0.5.
        seed: of the draws of ``dare_*``.

    Raises SurgeryError if an adapter is not known, the name is taken, one sits on a block or holds NaN, the sum is none
    that ``linear`` can say, or its numbers are too large. The model is then unchanged.
    """
    _check(weights, how, {"rank": rank, "density": density, "seed": seed})
    if (wrapper := synchronised_by(model)) is not None:
        raise SurgeryError(f"combine: {wrapper} has taken the model already. Combine first, and call {wrapper} then")
    model = unwrapped(model)
    for one in weights:
        known_adapter(model, one, "combine")
    require_new_name(model, name, "combine")
    sources = _sources(model, weights)
    places = _places(model, sources)
    ranks = [place.rank for place in places if place.rank]
    wishes = Wishes(how, rank or max(ranks, default=_RANK), 0.5 if density is None else density, seed)
    with torch.no_grad():
        made = sums(places, wishes)
        before = active_adapter(model)
        install(model, [target(place, total, made) for place, total in zip(places, made, strict=True)], name)
        try:
            fresh = entries(model, name)
            for place, total in zip(places, made, strict=True):
                stored = fresh[place.name].adapter.stored_tensors()
                for key, value in total.tensors.items():
                    if not stored[key].copy_(value).isfinite().all():
                        raise SurgeryError(
                            f"combine: with these weights {place.name}.{key} gets numbers that its "
                            f"{str(stored[key].dtype).removeprefix('torch.')} cannot hold. Take smaller ones. Nothing "
                            "was changed"
                        )
        except BaseException:
            remove_adapter(model, name)
            switch(model, before)
            raise
    return CombinationReport(name, how, {place.name: total.told for place, total in zip(places, made, strict=True)})


def _check(weights: Any, how: Any, said: Mapping[str, Any]) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise SurgeryError(f"combine: expected a mapping of adapters' names to weights, got {weights!r}")
    for one, share in weights.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not abs(share) <= sys.float_info.max:
            raise SurgeryError(f"combine: the weight of '{one}': expected a number, got {share!r}")
    known = get_args(How)
    if how not in known:
        raise SurgeryError(
            f"combine: how: expected one of {', '.join(known)}, got {how!r}.{did_you_mean(str(how), known)}"
        )
    ignored = {"linear": ("rank", "density", "seed"), "svd": ("density", "seed"), "ties": ("seed",)}.get(how, ())
    if odd := [key for key in ignored if said[key] != _OF_LINEAR[key]]:
        raise SurgeryError(f"combine: {odd[0]} means nothing to how={how!r}; leave it out")
    rank, density = said["rank"], said["density"]
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise SurgeryError(f"combine: rank: expected a whole number of at least 1, got {rank!r}")
    if density is not None and not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise SurgeryError(f"combine: density: expected a number above 0 and up to 1, got {density!r}")


def _sources(model: nn.Module, weights: Mapping[str, float]) -> dict[str, list[Source]]:
    """By the name of a module: what each of the adapters has there."""
    found: dict[str, list[Source]] = {}
    for adapter, share in weights.items():
        mine = entries(model, adapter)
        changes, _ = changed_weights(mine, "combine")
        by_name = {name: change for change in changes for name in change.names}
        for name, entry in mine.items():
            found.setdefault(name, []).append(Source(float(share), entry, by_name.get(name)))
    return found


def _places(model: nn.Module, sources: Mapping[str, list[Source]]) -> list[Place]:
    names: dict[int, list[str]] = {}
    for name, module in bare_modules(model):
        names.setdefault(id(bare(module)), []).append(name)
    places = [
        Place(tuple(names[id(module.base)]), module.base, sources[name])
        for name, module in adapted_modules(model)
        if name in sources
    ]
    shared: dict[int, list[Place]] = {}
    for place in places:
        parameters = place.sources[0].entry.handle.shared
        shared.setdefault(id(parameters[0] if parameters else place.module), []).append(place)
    for group in shared.values():
        if len({place.key for place in group}) > 1:
            for place in group:
                place.apart = True
    return places
