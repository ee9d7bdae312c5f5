"""PEFT's adapter format: ``adapter_config.json`` and ``adapter_model.safetensors`` (LoRA, and DoRA as ``use_dora``).

    base_model.model.MODULE.lora_A.weight             [rank, in]
    base_model.model.MODULE.lora_B.weight             [out, rank]
    base_model.model.MODULE.lora_magnitude_vector     [out], DoRA only
    base_model.model.MODULE.base_layer.weight         a copy of the base, which PEFT adds for an output head; read only

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
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import regex
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab import bases, methods
from trimtab.adapters.formats._adapter_format import AdapterFormat
from trimtab.adapters.record import StoredAdapter
from trimtab.adapters.safe_read import damage_in, parse_description, read_description, read_tensors, shown
from trimtab.bases import WeightBase
from trimtab.errors import AdapterError
from trimtab.files import write_json
from trimtab.methods import lora
from trimtab.surgery.adapted import Adapted, owners
from trimtab.surgery.wrappers import without_wrappers

_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"
_BASE = "base_layer.weight"
_HEADER = "trimtab"
# A pattern can be made to take hours. Honest ones are short, and all of a configuration take next to no time.
_SECONDS_FOR_PATTERNS = 10.0
_LONGEST_PATTERN = 1000

# Settings of a PEFT configuration that change what the adapter computes, and that we do not support.
_REFUSED = {
    "modules_to_save": "whole modules stored beside the adapter; merge them into the base with PEFT first",
    "layer_replication": "a base with repeated layers",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters on bare parameters",
    "alora_invocation_tokens": "an adapter that switches on at certain tokens",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias inside the update",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's parallel layers",
}
# Initialisations that also change the base weights, so that the adapter is useless on the original ones.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftFormat(AdapterFormat):
    """``adapter_config.json`` and ``adapter_model.safetensors``."""

    files = ("adapter_config.json", "adapter_model.safetensors")
    label = "PEFT"
    preference = 0  # the tools that people run read it

    def can_express(self, model: nn.Module, adapted: dict[str, Adapted]) -> bool:
        options = [
            module.adapter.options for module in adapted.values() if isinstance(module.adapter.options, lora.Options)
        ]
        return (
            len(options) == len(adapted)
            and all(one.rank > 0 for one in options)
            and {module.method for module in adapted.values()} <= {"lora", "dora"}
            and len({one.magnitude for one in options}) == 1
            and not any(one.magnitude and one.magnitude_axis != "output" for one in options)
            and len({one.rank_stabilised for one in options}) == 1
            # PEFT keeps what is read and not called in another place.
            and all(not isinstance(module.handle, WeightBase) or module.handle.is_called for module in adapted.values())
            # PEFT divides by the norm even where it is zero, which gives NaN.
            and not any(module.adapter.zero_rows for module in adapted.values())
            # PEFT adapts only the first place of a layer that hangs in two, and merges twice into a shared weight.
            and sum(isinstance(child, Adapted) for *_, child in owners(model)) == len(adapted)
            and len({id(module.adapter) for module in adapted.values()}) == len(adapted)
        )

    def save(self, model: nn.Module, adapted: dict[str, Adapted], folder: Path) -> None:
        tensors = {}
        for name, module in adapted.items():
            handle = module.handle
            assert isinstance(handle, WeightBase)
            for key, value in module.adapter.named_parameters():
                laid_out = handle.in_layout(key, value.detach()).contiguous().clone()
                tensors[f"{_PREFIX}{name}.{handle.peft_names[key]}"] = laid_out
        options = {
            name: {"method": module.method, "options": module.adapter.options.model_dump()}
            for name, module in adapted.items()
        }
        save_file(tensors, folder / self.files[1], metadata={"format": "pt", _HEADER: json.dumps(options)})
        write_json(folder / self.files[0], _configuration(model, adapted))

    def load(self, folder: Path) -> dict[str, StoredAdapter]:

        path = folder / self.files[0]
        config = read_description(path)
        _refuse(path, config)
        weights = folder / self.files[1]
        if not weights.is_file() and (folder / "adapter_model.bin").is_file():
            raise AdapterError(
                f"{folder}: the weights are a pickle (adapter_model.bin), which could run code when read. Load and "
                "save the adapter once with PEFT (safe_serialization=True) where you trust it"
            )
        tensors, header = read_tensors(weights)
        modules = _by_module(weights, tensors)
        with damage_in(path, "configuration"):
            in_config = _options(config, list(modules))
            in_header = _options_in_header(header) if _HEADER in header else in_config
        every = in_config | in_header
        odd = [name for name in every if _outputs(in_config.get(name)) != _outputs(in_header.get(name))]
        if odd:
            raise AdapterError(
                f"{path} is not the one that {self.files[1]} was saved with: they differ at {len(odd)} modules, "
                f"such as {shown(odd[0])}, so a save was interrupted, or one of the two was changed. Save the adapter "
                "again. To take both as they stand, load and save them once with PEFT"
            )
        return {
            name: StoredAdapter(*in_header[name], own, base=own.pop(_BASE, None), in_layout=True)
            for name, own in modules.items()
        }


def _configuration(model: nn.Module, adapted: dict[str, Adapted]) -> dict[str, Any]:
    options: dict[str, Any] = {name: module.adapter.options for name, module in adapted.items()}
    ranks = {name: one.rank for name, one in options.items()}
    alphas = {name: 2 * one.rank if one.alpha is None else one.alpha for name, one in options.items()}
    dropouts = Counter(one.dropout for one in options.values())
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    first = next(iter(options.values()))
    weights = [module.handle for module in adapted.values()]
    # The class decides, since the configuration of a bare LlamaModel also names a causal model ("architectures").
    kind = type(model).__name__
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": dropouts.most_common(1)[0][0],
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_exactly(name): _plain(value) for name, value in alphas.items() if value != alpha},
        "target_modules": _targets(model, adapted),
        "fan_in_fan_out": all(isinstance(base, WeightBase) and base.stored_transposed for base in weights),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_dora": first.magnitude,
        "use_rslora": first.rank_stabilised,
    }


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _exactly(name: str) -> str:
    """A pattern for ``name`` alone. Without the ``^``, PEFT would also match longer names that end in it."""
    return f"^{re.escape(name)}"


def _targets(model: nn.Module, adapted: dict[str, Adapted]) -> list[str] | str:
    """The shortest ``target_modules`` by which PEFT, which matches the ends of names, selects exactly these modules."""
    wanted = set(adapted)
    inside = {id(inner) for module in adapted.values() for inner in module.modules()}  # with the module itself
    others = [without_wrappers(model, name) for name, module in model.named_modules() if id(module) not in inside]
    tails = {name.rsplit(".", 1)[-1] for name in wanted}
    for candidate in (tails, wanted):
        if not any(end in candidate for name in others for end in _ends(name)):
            return sorted(candidate)
    return "|".join(re.escape(name) for name in sorted(wanted))


def _ends(name: str) -> list[str]:
    """``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``."""
    parts = name.split(".")
    return [".".join(parts[place:]) for place in range(len(parts))]


def _by_module(weights: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``module -> our name of the tensor -> tensor``. Raises AdapterError for a tensor that does not belong there."""
    modules: dict[str, dict[str, Tensor]] = {}
    names = bases.peft_names()
    # Older PEFT releases added ".weight" to the magnitude's name, and some gave it a second axis.
    ours = names | {f"{_MAGNITUDE}.weight": "magnitude", _BASE: _BASE}
    pattern = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(map(re.escape, ours))})")
    for key, tensor in tensors.items():
        parts = pattern.fullmatch(key)
        module, own = (parts[1], ours[parts[2]]) if parts else ("", "")
        if not parts or own in modules.setdefault(module, {}):
            raise AdapterError(
                f"{weights}: unexpected tensor {shown(key)}; expected {_PREFIX}MODULE.{{{', '.join(names)}}}, each once"
            )
        is_row = own == "magnitude" and tensor.squeeze().dim() <= 1
        modules[module][own] = tensor.reshape(-1) if is_row else tensor
    return modules


def _refuse(path: Path, config: dict[str, Any]) -> None:
    """Raise AdapterError for a configuration that asks for something that we do not support."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type is {shown(kind)}; only LORA (with or without use_dora) can be loaded")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{path}: '{key}' is set ({meaning}), which is not supported")
    if (config.get("bias") or "none") != "none":
        raise AdapterError(f"{path}: bias is {shown(config['bias'])}: trained biases are not supported, only 'none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights is {shown(start)}, which changes the base weights; convert the adapter to "
            "plain LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion) first"
        )


def _options(config: dict[str, Any], names: list[str]) -> dict[str, tuple[str, methods.Options]]:
    """``module -> (method, options)`` from PEFT's configuration."""
    method = "dora" if config.get("use_dora") else "lora"
    ranks = _pattern(config.get("rank_pattern") or {}, config["r"])
    alphas = _pattern(config.get("alpha_pattern") or {}, config["lora_alpha"])
    common: dict[str, Any] = {
        "rank_stabilised": bool(config.get("use_rslora")),
        "dropout": float(config.get("lora_dropout") or 0.0),
    }
    kind = methods.options_class(method)
    return {name: (method, kind(**{"rank": ranks(name), "alpha": alphas(name), **common})) for name in names}


def _options_in_header(header: dict[str, str]) -> dict[str, tuple[str, methods.Options]]:
    """``module -> (method, options)`` from our header."""
    return {
        name: (entry["method"], methods.options_class(entry["method"])(**entry["options"]))
        for name, entry in parse_description(header[_HEADER]).items()
    }


def _outputs(entry: tuple[str, methods.Options] | None) -> Any:
    """The options that decide the outputs, as far as PEFT has them; in all others the two files may differ."""
    options = entry[1] if entry else None
    if not isinstance(options, lora.Options):
        return None
    return options.rank, options.scale, options.magnitude, options.magnitude_axis


def _pattern(patterns: dict[str, Any], default: Any) -> Callable[[str], Any]:
    """A function from a module's name to its value in ``patterns``, or else to ``default``.

    As in PEFT, each key is a regular expression, and the first one that matches the end of the name decides. This
    function or the returned one raises ValueError for a key that is no regular expression, or that takes too long.
    """
    if all(key == _exactly(re.sub(r"\\(.)", r"\1", key[1:])) for key in patterns):  # whole names, as we write them
        return lambda name: patterns.get(_exactly(name), default)
    compiled = []
    for key, value in patterns.items():
        # Counted repeats can compile to gigabytes, and no honest pattern has them.
        if len(key) > _LONGEST_PATTERN or "{" in key:
            raise ValueError(f"the pattern {shown(key)} is too long, or counts repeats")
        try:
            re.compile(pattern := rf"(.*\.)?({key})$")  # PEFT uses re; the language of regex is wider
            compiled.append((key, regex.compile(pattern), value))
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{shown(key)} is not a regular expression ({error})") from None
    end = time.monotonic() + _SECONDS_FOR_PATTERNS

    def decide(name: str) -> Any:
        for key, expression, value in compiled:
            try:
                if expression.match(name, timeout=max(end - time.monotonic(), 0.001)):
                    return value
            except TimeoutError:
                raise ValueError(f"the pattern {shown(key)} takes more than {_SECONDS_FOR_PATTERNS} seconds") from None
        return default

    return decide
