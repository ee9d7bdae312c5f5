"""Fold every adapter into its base: afterwards the model is an ordinary one, and inference costs nothing extra."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from trimtab.errors import SurgeryError
from trimtab.surgery.adapted import is_finite, weights_elsewhere
from trimtab.surgery.attach import remove_adapters, require_adapted


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    ``modules``: names of the merged modules. ``rounding``: the largest ``||stored - exact|| / ||exact||`` over the
    merged weights, which is what storing them in the base's dtype costs. ``untied``: modules that shared their weight
    with a module without an adapter and now have their own.
    """

    modules: tuple[str, ...]
    rounding: float
    untied: tuple[str, ...]


@torch.no_grad()
def merge(model: nn.Module) -> MergeReport:
    """Fold every adapter of ``model`` into its base in place, and remove it.

    The effective weight is computed in float64 by the plain formula and rounded once, to the base's dtype. A weight
    that several adapted modules share is folded once. A weight shared with a module that has no adapter (an output
    head tied to the embedding) is copied first, so that the other module keeps what it had;
    ``model.config.tie_word_embeddings`` is then turned off.

    Raises SurgeryError if the model has no adapters, if one holds NaN or infinity, or if a merged weight does not fit
    into its base's dtype; the model is then unchanged.
    """
    adapted = require_adapted(model, "merge")
    for name, module in adapted:
        if not is_finite(module.adapter):
            raise SurgeryError(
                f"merge: the adapter of {name} holds NaN or infinity, and would destroy the weight it is folded into. "
                "Nothing was changed; load an earlier checkpoint"
            )
    # Finite tensors can have a product that is not, or one beyond what the base's dtype holds. All are looked at before
    # the first is written; computing each twice is the price of never leaving half a merge.
    for name, module in adapted:
        stored = module.adapter.effective_weight(module.handle, torch.float64).to(module.handle.dtype)
        if not torch.isfinite(stored).all():
            raise SurgeryError(
                f"merge: the merged weight of {name} does not fit into {module.handle.dtype} or is not a number. "
                "Nothing was changed; merge in a wider dtype, or load an earlier checkpoint"
            )
    bases = {id(module.base) for _, module in adapted}
    untied = []
    merged: dict[int, float] = {}
    shared: dict[int, nn.Parameter] = {}
    for name, module in adapted:
        handle, key = module.handle, id(module.handle.parameter)
        if key in merged:
            continue
        if key in shared:
            handle.module.weight = shared[key]
            continue
        if weights_elsewhere(model, handle.parameter, bases):
            handle.untie()
            untied.append(name)
            shared[key] = handle.parameter
        exact = module.adapter.effective_weight(handle, torch.float64)
        handle.write(exact)
        length = exact.norm()
        error = (handle.weight().double() - exact).norm()
        merged[id(handle.parameter)] = float(error / length) if length > 0 else 0.0
    remove_adapters(model)
    config = getattr(model, "config", None)
    if untied and config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return MergeReport(tuple(name for name, _ in adapted), max(merged.values()), tuple(untied))
