"""Merges every adapter into its base, which leaves an ordinary model that costs nothing extra to run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from trimtab import bases, methods
from trimtab.bases import WeightBase
from trimtab.errors import SurgeryError
from trimtab.ops.spread import is_spread, whole
from trimtab.surgery.adapted import (
    Adapted,
    AdaptedBlock,
    AdaptedLayer,
    bare,
    bare_modules,
    carriers,
    owners,
    require_adapted,
    weights_elsewhere,
)
from trimtab.surgery.install import remove_adapter, remove_adapters, require_no_rows
from trimtab.surgery.merged_parts import merged_parts
from trimtab.surgery.names import active_adapter, adapters, known_adapter
from trimtab.surgery.sharded import put_away, whole_tensors
from trimtab.surgery.ties import keep_other_ties, parameters_by_name
from trimtab.surgery.weight_of_own import usable
from trimtab.surgery.wrappers import unwrapped

Onto = Literal["dequantised", "requantised"]


@dataclass(frozen=True)
class MergeReport:
    """What was merged.

    Attributes:
        modules: names of the merged modules.
        rounding: the largest ``||stored - exact|| / ||exact||`` of a merged weight, which is the error of storing it in
            the base's dtype or of quantising it again.
        untied: modules that shared their weight with a module without an adapter, and now have a weight of their own.
        dequantised: modules, adapted or not, that were quantised and now have a dense weight.
    """

    modules: tuple[str, ...]
    rounding: float
    untied: tuple[str, ...]
    dequantised: tuple[str, ...] = ()


@torch.no_grad()
def merge(model: nn.Module, onto: Onto = "dequantised") -> MergeReport:
    """Fold the active adapter of ``model`` into its base in place, and remove all adapters.

    The effective weight is computed in float64 by the plain formula, and rounded once to the base's dtype. A weight
    that several adapted modules share is merged once. A weight that is shared with a module without an adapter (an
    output head tied to the embedding) is copied first, so that the other module keeps its weight. All other ties stay,
    and the merged model computes the same after ``save_pretrained`` and ``from_pretrained``:
    ``config.tie_word_embeddings`` is turned off where it says no more than the tie that is undone; where it also holds
    other ties or scales the head's input (T5 and its family), it stays, and both weights are saved.

    ``onto`` says what happens to quantised weights:

    - ``dequantised``: merge onto the dequantised weights. The adapter was trained on them, so the merged model computes
      what the adapted one did. *Every* quantised layer of the model becomes an ordinary linear layer in the dtype of
      the rest, and ``model.config`` no longer mentions quantisation.
    - ``requantised``: the same, and then quantise every merged weight again. The model is as small as before, at the
      cost of a second quantisation error, which ``MergeReport.rounding`` states.

    To merge onto the original weights instead, load the model unquantised, load the adapter onto it with
    ``trimtab.load_adapter``, and merge that. The result then lacks the quantisation error that the adapter was trained
    with.

    Raises SurgeryError if the model has no adapters or none is active, if one sits on a block, if one holds NaN or
    infinity, or if a merged weight does not fit into its base's dtype. The model is then unchanged.
    """
    if onto not in get_args(Onto):
        raise SurgeryError(
            f"merge: onto is expected to be one of {', '.join(get_args(Onto))}, got {onto!r}. (To merge onto the "
            "original weights: load the model unquantised, then trimtab.load_adapter and trimtab.merge)"
        )
    model = unwrapped(model)
    put_away(model)
    adapted = _require_mergeable(model)
    around = _dtype_around(model)
    # Every weight is computed and checked before the first is written, so that no merge stops halfway.
    for name, module in adapted:
        handle = module.handle
        wide = onto == "dequantised" and isinstance(handle, WeightBase) and not handle.stored_dense
        with usable([module]):
            _check_result(name, module, around or handle.dtype if wide else None)
    _require_ties_stay(adapted, _Elsewhere(model, adapted))
    for other in adapters(model):
        if other != active_adapter(model):
            remove_adapter(model, other)
    dequantised = _dequantise(model, around) if onto == "dequantised" else ()
    before = parameters_by_name(model)
    rounding, untied = _fold(adapted, _Elsewhere(model, adapted))
    remove_adapters(model)
    if untied:
        untied = tuple(dict.fromkeys(untied + keep_other_ties(model, before)))
    return MergeReport(tuple(name for name, _ in adapted), rounding, untied, dequantised)


def _require_mergeable(model: nn.Module) -> list[tuple[str, Adapted]]:
    """The modules that the active adapter has. Raises SurgeryError if it cannot be merged into weights."""
    require_no_rows(model)
    carried, name = require_adapted(model, "merge"), known_adapter(model, None, "merge")
    adapted = [(place, module) for place, module in carried if name in module.adapter_slots]
    blocks = [(name, module) for name, module in adapted if isinstance(module, AdaptedBlock)]
    if blocks:
        raise SurgeryError(
            f"merge: {len(blocks)} adapters sit on blocks, such as {blocks[0][0]} (method {blocks[0][1].method}): an "
            "activation stands between their two products, so there is no weight to fold them into. Nothing was "
            "changed; keep the adapter beside the model, or train with a method that changes weights "
            f"({', '.join(methods.names('weight'))})"
        )
    for name, module in adapted:
        handle = module.handle
        nowhere = isinstance(handle, WeightBase) and handle.parameter.is_meta and handle.at_hand().is_meta
        if nowhere or any(tensor.is_meta for tensor in module.current_adapter.parameters()):
            raise SurgeryError(
                f"merge: {name} is on the meta device, without numbers. Nothing was changed; load the model's weights "
                "and its adapter first"
            )
        if not all(torch.isfinite(whole(parameter)).all() for parameter in module.current_adapter.parameters()):
            raise SurgeryError(
                f"merge: the adapter of {name} holds NaN or infinity, and would destroy the weight it is folded into. "
                "Nothing was changed; load an earlier checkpoint"
            )
        if not isinstance(module, AdaptedLayer):
            continue
        if module.current_adapter.bias is not None and module.handle.stored_bias is None:
            raise SurgeryError(
                f"merge: the adapter of {name} has a bias (PEFT's lora_bias), and the layer has none that it could be "
                "folded into. Nothing was changed; keep the adapter beside the model"
            )
    return adapted


def _check_result(name: str, module: Adapted, dtype: torch.dtype | None) -> None:
    """Raise SurgeryError if what is merged does not fit into ``dtype`` (None: that of what is stored); finite trained
    tensors do not rule that out."""
    with whole_tensors(module.current_adapter):
        for part in merged_parts(module):
            stored = part.stored().dtype
            kind = dtype or (stored if stored.is_floating_point else module.handle.dtype)
            if not torch.isfinite(part.value().to(kind)).all():
                raise SurgeryError(
                    f"merge: the merged weight of {name} does not fit into {kind} or is not a number. "
                    "Nothing was changed; merge in a wider dtype, or load an earlier checkpoint"
                )


class _Elsewhere:
    """Which merged weights of ``model`` hang in modules, too, for which they are not merged."""

    def __init__(self, model: nn.Module, adapted: list[tuple[str, Adapted]]) -> None:
        self._model = model
        # By the id of a parameter: the modules for which it is merged; not one that is adapted in another tensor.
        self._merged_in: dict[int, set[int]] = defaultdict(set)
        for _, module in adapted:
            inside = {id(inner) for inner in (module.handle.owner, *module.base.modules())}
            apart = (child for child in module.base.modules() if isinstance(child, Adapted))  # merged for themselves
            ids = inside - {id(inner) for child in apart for inner in child.modules()}
            for part in merged_parts(module):
                self._merged_in[id(part.stored())] |= ids
        self._places = {name: bare(module) for name, module in bare_modules(model)}

    def hangs(self, name: str, weight: object) -> bool:
        """Whether ``weight``, of the module ``name``, does."""
        # What a module around this one holds as well is the same thing under a second name.
        around = {id(self._places.get(name[:end])) for end, letter in enumerate(name) if letter == "."}
        inside = self._merged_in[id(weight)] | around
        return isinstance(weight, nn.Parameter) and weights_elsewhere(self._model, weight, inside)


def _require_ties_stay(adapted: list[tuple[str, Adapted]], elsewhere: _Elsewhere) -> None:
    """Raise SurgeryError for a weight that is sharded and would have to be untied, which FSDP2 would not follow."""
    sources: dict[int, object] = {}
    for name, module in adapted:
        for part in merged_parts(module):
            weight = part.stored()
            apart = sources.setdefault(id(weight), part.source) is not part.source
            if is_spread(weight) and (apart or elsewhere.hangs(name, weight)):
                raise SurgeryError(
                    f"merge: {name} shares its weight with a module that is not merged with it, and the two would part "
                    "here, which a sharded model (fully_shard) cannot. Nothing was changed; save the adapter, and "
                    "merge it in one process, on a model that is loaded as a whole"
                )


def _fold(adapted: list[tuple[str, Adapted]], elsewhere: _Elsewhere) -> tuple[float, tuple[str, ...]]:
    """Write every effective weight into its base. Return the largest rounding and the names of the untied modules."""
    untied = []
    rounding: dict[int, float] = {}  # by the id of the written weight
    own_weight: dict[int, nn.Parameter] = {}  # by the id of the shared weight that was copied
    sources: dict[int, object] = {}  # by the id of the stored weight
    for name, module in adapted:
        for part in merged_parts(module):
            if sources.setdefault(id(part.stored()), part.source) is not part.source:  # tied, and trained apart
                part.untie()
                untied.append(name)
    for name, module in adapted:
        for part in merged_parts(module):
            shared = part.stored()
            key = id(shared)
            if key in rounding:
                continue
            if key in own_weight:
                part.hang(own_weight[key])
                continue
            if elsewhere.hangs(name, shared):
                part.untie()
                untied.append(name)
                own_weight[key] = part.stored()  # type: ignore[assignment]
            with whole_tensors(module.current_adapter):
                exact = part.value().double()
            part.write(exact)
            length = exact.norm()
            error = (part.read().double() - exact).norm()
            rounding[id(part.stored())] = float(error / length) if length > 0 else 0.0
    return max(rounding.values(), default=0.0), tuple(dict.fromkeys(untied))


def _dtype_around(model: nn.Module) -> torch.dtype | None:
    """The dtype of the model's first floating-point parameter that is not an adapter's; None if there is none."""
    own = {id(one) for module in carriers(model) for adapter in module.every_adapter() for one in adapter.parameters()}
    plain = (parameter for parameter in model.parameters() if id(parameter) not in own)
    return next((parameter.dtype for parameter in plain if parameter.is_floating_point()), None)


def _dequantise(model: nn.Module, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Replace every quantised layer, adapted or not, by a dense one, and return their names."""
    made: dict[int, nn.Module] = {}
    names = []
    for name, parent, attribute, child in list(owners(model)):
        if id(child) not in made:
            handle = bases.find(child)
            if handle is None or handle.stored_dense:
                continue
            made[id(child)] = handle.as_dense(dtype or handle.dtype)
            names.append(name.removesuffix(".base") if isinstance(parent, Adapted) else name)
        parent._modules[attribute] = made[id(child)]
    if names:
        _forget_quantisation(model)
    return tuple(names)


def _forget_quantisation(model: Any) -> None:
    """Remove transformers' notes about the quantisation, which it would save and follow when it loads the model."""
    if hasattr(model, "config") and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for note in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(note, None)
