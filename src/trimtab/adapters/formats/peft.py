"""PEFT's adapter format: ``adapter_config.json`` and ``adapter_model.safetensors`` (LoRA, and DoRA as ``use_dora``).

    base_model.model.MODULE.lora_A.weight             [rank, in]
    base_model.model.MODULE.lora_B.weight             [out, rank]
    base_model.model.MODULE.lora_magnitude_vector     [out], DoRA only
    base_model.model.MODULE.base_layer.weight         a copy of the base, which PEFT adds for an output head; read only
    base_model.model.MODULE.base_layer.bias           the layer's bias, if it is trained ("bias": "lora_only" or "all")
    base_model.model.MODULE.token_adapter.trainable_tokens_delta    rows of an embedding or a head that are trained
                                                      ("trainable_token_indices")
    base_model.model.MODULE.TENSOR                    a tensor of a module that is trained as a whole, by method full
                                                      ("modules_to_save"), or another bias ("bias": "all")

The base of a layer that is not linear says what its tensors are called and how they are laid out
(``WeightBase.peft_names``, ``in_layout``).

Some options matter only for further training and have no place in PEFT's configuration, such as ``detach_norm`` or a
dropout for each module. The header of the safetensors file, which PEFT ignores, therefore has the method and options of
every module as JSON under ``"trimtab"``. They also tell whether the two files are from one save. PEFT itself is not
needed for any of this.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab import methods
from trimtab.adapters.formats import _peft_config, _peft_names, _peft_own, _peft_targets
from trimtab.adapters.formats._adapter_format import AdapterFormat
from trimtab.adapters.formats._peft_refusals import refuse
from trimtab.adapters.record import StoredAdapter
from trimtab.adapters.safe_read import damage_in, parse_description, read_description, read_tensors, shown
from trimtab.adapters.stored_head import head_header, task_type
from trimtab.bases import WeightBase
from trimtab.errors import AdapterError, TrimtabWarning
from trimtab.files import write_json, write_tensors
from trimtab.methods import lora
from trimtab.surgery.adapted import Adapted, owners
from trimtab.surgery.wrappers import without_wrappers

_HEADER = "trimtab"


class PeftFormat(AdapterFormat):
    """``adapter_config.json`` and ``adapter_model.safetensors``."""

    files = ("adapter_config.json", "adapter_model.safetensors")
    label = "PEFT"
    preference = 0  # the tools that people run read it

    def can_express(self, model: nn.Module, adapted: dict[str, Adapted]) -> bool:
        updated = _updated(adapted)
        options: list[Any] = [module.adapter.options for module in updated.values()]
        hanging = [id(child) for *_, child in owners(model) if isinstance(child, Adapted)]
        return (
            len(options) > 0
            and {module.method for module in adapted.values()} <= {"lora", "dora", _peft_own.METHOD}
            and all(map(_peft_names.can_be_read, adapted))
            and _peft_own.said_of(model, adapted) is not None
            and all(one.rank > 0 for one in options)
            and len({one.magnitude for one in options}) == 1
            and not any(one.magnitude and one.magnitude_axis != "output" for one in options)
            and len({one.rank_stabilised for one in options}) == 1
            and (places := _places(updated)) is not None
            # A place has the tensors of one entry, and a module that PEFT saves whole has no adapter in it.
            and not any(
                f"{place}.".startswith(f"{name}.") for place in places for name in adapted.keys() - updated.keys()
            )
            # PEFT divides by the norm even where it is zero, which gives NaN.
            and not any(module.adapter.zero_rows for module in adapted.values())
            # PEFT adapts only the first place of a layer that hangs in two, and merges twice into a shared weight.
            and len(hanging) == len(set(hanging))
            and len({id(module.adapter) for module in adapted.values()}) == len(adapted)
        )

    def save(self, model: nn.Module, adapted: dict[str, Adapted], folder: Path) -> None:
        placed, said = _places(_updated(adapted)), _peft_own.said_of(model, adapted)
        assert placed is not None
        assert said is not None
        configuration = _configuration(model, _updated(adapted)) | said._asdict()
        configuration["task_type"] = task_type(model, said.modules_to_save or ())
        placed |= _peft_own.written(model, adapted)
        tensors = {
            f"{_peft_names.PREFIX}{place}.{key}": value.detach().contiguous().clone()
            for place, module in placed.items()
            for key, value in _laid_out(module).items()
        }
        options = {
            place: {"method": module.method, "options": module.adapter.options.model_dump()}
            for place, module in placed.items()
        }
        header = {"format": "pt", _HEADER: json.dumps(options), **head_header(model)}
        write_tensors(folder / self.files[1], tensors, header)
        write_json(folder / self.files[0], configuration)

    def load(self, folder: Path) -> dict[str, StoredAdapter]:

        path = folder / self.files[0]
        config = read_description(path)
        refuse(path, config)
        weights = folder / self.files[1]
        if not weights.is_file() and (folder / "adapter_model.bin").is_file():
            raise AdapterError(
                f"{folder}: the weights are a pickle (adapter_model.bin), which could run code when read. Load and "
                "save the adapter once with PEFT (safe_serialization=True) where you trust it"
            )
        tensors, header = read_tensors(weights)
        modules, whole = _peft_names.by_module(weights, tensors, config)
        if gone := _peft_own.missing(config, whole):
            warnings.warn(
                f"{weights}: nothing is stored of {shown(', '.join(gone))}, which {self.files[0]} says was trained as "
                "a whole (modules_to_save). What the model has of it stays as it is",
                TrimtabWarning,
                stacklevel=2,
            )
        with damage_in(path, "configuration"):
            for own in modules.values():
                bias = own.pop(_peft_names.BASE_BIAS, None)
                if bias is not None and (config.get("bias") or "none") != "none":
                    own["bias"] = bias
            in_config = _peft_config.options(config, modules)
            on_parameters = _peft_config.options_on_parameters(config, modules)
            in_config |= {name: _peft_own.options_of(config, name, own) for name, own in whole.items()}
            in_header = _options_in_header(header) if _HEADER in header else in_config
        every = in_config | in_header
        choices = {place: [in_config.get(place), *on_parameters.get(place, {}).values()] for place in every}
        odd = [place for place in every if _outputs(in_header.get(place)) not in map(_outputs, choices[place])]
        if odd:
            raise AdapterError(
                f"{path} is not the one that {self.files[1]} was saved with: they differ at {len(odd)} modules, "
                f"such as {shown(odd[0])}, so a save was interrupted, or one of the two was changed. Save the adapter "
                "again. To take both as they stand, load and save them once with PEFT"
            )
        return {
            _peft_names.module_of(place): StoredAdapter(
                *in_header[place],
                own,
                base=own.pop(_peft_names.BASE, None),
                parameters={
                    parameter: (in_header[place] if _HEADER in header else said)[1]
                    for parameter, said in on_parameters[place].items()
                },
                in_layout=True,
                alone=_peft_names.target_of(place) == place,
            )
            for place, own in modules.items()
        } | _peft_own.stored_own(config, whole, in_header)

    def left_out(self, folder: Path, modules: Mapping[str, nn.Module], stored: Collection[str]) -> list[str]:
        return _peft_targets.left_out(read_description(folder / self.files[0]), modules, stored)


def _updated(adapted: dict[str, Adapted]) -> dict[str, Adapted]:
    """The layers that have an update, and not tensors of their own that are trained."""
    return {name: module for name, module in adapted.items() if isinstance(module.adapter.options, lora.Options)}


def _laid_out(module: Adapted) -> dict[str, Tensor]:
    """The trained tensors of ``module`` under PEFT's names and in PEFT's layout."""
    handle = module.handle
    if module.method == _peft_own.METHOD:
        return _peft_own.tensors_of(module)
    assert isinstance(handle, WeightBase)
    names = {**handle.peft_names, "bias": _peft_names.BASE_BIAS}
    return {
        names[handle.peft_key(key)]: handle.in_layout(key, one) for key, one in module.adapter.stored_tensors().items()
    }


def _places(adapted: dict[str, Adapted]) -> dict[str, Adapted] | None:
    """Where PEFT keeps the tensors of each adapted layer; None if it has no place for one of them.

    Layers that PEFT can only adapt together (the projections of ``nn.MultiheadAttention``) must have one rank, one
    scale, no magnitude and no dropout anywhere.
    """
    placed = {}
    for name, module in adapted.items():
        if not isinstance(handle := module.handle, WeightBase) or (place := handle.peft_place(name)) is None:
            return None
        if handle.is_peft_parameter:
            # PEFT has no magnitude on parameters, and no dropout of any module beside them.
            if module.adapter.magnitude is not None or any(one.adapter.options.dropout for one in adapted.values()):
                return None
            place = _peft_names.wrapped(name, handle.owner, adapted)
        if handle.peft_differs(module.adapter.options):
            return None
        if (partner := handle.peft_partner(name)) is not None:
            other = adapted.get(partner)
            if other is None or module.adapter.magnitude is not None or _computed(module) != _computed(other):
                return None
            if any(one.adapter.options.dropout for one in adapted.values()):  # PEFT has one dropout for all modules
                return None
        placed[place] = module
    return placed


def _on_parameter(module: Adapted) -> bool:
    return isinstance(module.handle, WeightBase) and module.handle.is_peft_parameter


def _configuration(model: nn.Module, every: dict[str, Adapted]) -> dict[str, Any]:
    parameters = {name: module for name, module in every.items() if _on_parameter(module)}
    placed = _places({name: module for name, module in every.items() if name not in parameters}) or {}
    modules = {place: module for place, module in placed.items() if _peft_names.target_of(place) == place}
    adapted = modules | parameters
    options: dict[str, Any] = {name: module.adapter.options for name, module in adapted.items()}
    ranks = {name: one.rank for name, one in options.items()}
    alphas = {name: 2 * one.rank if one.alpha is None else one.alpha for name, one in options.items()}
    dropouts = Counter(one.dropout for one in options.values())
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    first = next(iter(options.values()))
    weights = [module.handle for module in modules.values()]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": dropouts.most_common(1)[0][0],
        "rank_pattern": {_peft_config.exactly(name): one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {
            _peft_config.exactly(name): _plain(value) for name, value in alphas.items() if value != alpha
        },
        "target_modules": _targets(model, modules),
        "target_parameters": sorted(parameters) or None,
        "fan_in_fan_out": any(weights)
        and all(isinstance(base, WeightBase) and base.stored_transposed for base in weights),
        "init_lora_weights": True,
        "use_dora": first.magnitude,
        "use_rslora": first.rank_stabilised,
    }


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _targets(model: nn.Module, adapted: dict[str, Adapted]) -> list[str] | str:
    """The shortest ``target_modules`` by which PEFT, which matches the ends of names, selects exactly these modules."""
    wanted = set(adapted)
    inside = {id(inner) for module in adapted.values() for inner in module.modules()}  # with the module itself
    names = [without_wrappers(model, name) for name, module in model.named_modules() if id(module) not in inside]
    others = [name for name in names if name not in wanted]  # attention that PEFT wraps around what is adapted in it
    tails = {name.rsplit(".", 1)[-1] for name in wanted}
    for candidate in (tails, wanted):
        if not any(_peft_targets.ends_with(name, candidate) for name in others):
            return sorted(candidate)
    return "|".join(re.escape(name) for name in sorted(wanted))


def _options_in_header(header: dict[str, str]) -> dict[str, tuple[str, methods.Options]]:
    """``module -> (method, options)`` from our header."""
    return {
        name: (entry["method"], methods.options_class(entry["method"])(**entry["options"]))
        for name, entry in parse_description(header[_HEADER]).items()
    }


def _computed(module: Adapted) -> Any:
    return _outputs((module.method, module.adapter.options))


def _outputs(entry: tuple[str, methods.Options] | None) -> Any:
    """The options that decide the outputs, as far as PEFT has them; in all others the two files may differ."""
    options = entry[1] if entry else None
    if not isinstance(options, lora.Options):
        return type(options)
    return options.rank, options.scale, options.magnitude, options.magnitude_axis
