"""PEFT's adapter format: ``adapter_config.json`` and ``adapter_model.safetensors`` (LoRA, and DoRA as ``use_dora``).

    base_model.model.MODULE.lora_A.weight             [rank, in]
    base_model.model.MODULE.lora_B.weight             [out, rank]
    base_model.model.MODULE.lora_magnitude_vector     [out], DoRA only
    base_model.model.MODULE.base_layer.weight         a copy of the base, which PEFT adds for an output head; read only

What only matters for further training and has no place in PEFT's configuration (dropout per module, ``detach_norm``)
stands in the header of the safetensors file, where PEFT does not look: ``"trimtab"``, the method and options of every
module as JSON. It also tells whether the two files belong together. PEFT itself is not needed for any of this.
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

from trimtab import methods
from trimtab.adapters.record import StoredAdapter, name_on_disk
from trimtab.adapters.safe_read import parse_description, read_description, read_tensors, shown
from trimtab.errors import AdapterError, PlanError
from trimtab.files import write_json
from trimtab.methods import lora
from trimtab.surgery.adapted import Adapted, owners

FILES = ("adapter_config.json", "adapter_model.safetensors")
LABEL = "PEFT"
PREFERENCE = 0  # the tools that people run read it
_PREFIX = "base_model.model."
_TENSORS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_BASE = "base_layer.weight"
_HEADER = "trimtab"
# Seconds that the patterns of one configuration may take, and characters of one; honest ones take none of either.
_PATIENCE = 10.0
_LONGEST_PATTERN = 1000

# Settings of a PEFT configuration that change what the adapter computes, and that we do not have.
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
# Initialisations that leave their mark on the base weights, so that the adapter is nothing without that base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def can_express(model: nn.Module, adapted: dict[str, Adapted]) -> bool:
    """Whether one PEFT configuration describes all of these adapters, so that PEFT computes the same outputs."""
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
        # PEFT divides by the norm as it is: NaN on a row of zeros.
        and not any(module.adapter.zero_rows for module in adapted.values())
        # PEFT adapts a layer that hangs in two places in the first only, and merges into a shared weight twice.
        and sum(isinstance(child, Adapted) for *_, child in owners(model)) == len(adapted)
        and len({id(module.adapter) for module in adapted.values()}) == len(adapted)
    )


def save(model: nn.Module, adapted: dict[str, Adapted], folder: Path) -> None:
    """Write the two files."""
    tensors = {
        f"{_PREFIX}{name}.{_TENSORS[key]}": value.detach().contiguous().clone()
        for name, module in adapted.items()
        for key, value in module.adapter.named_parameters()
    }
    said = {
        name: {"method": module.method, "options": module.adapter.options.model_dump()}
        for name, module in adapted.items()
    }
    save_file(tensors, folder / FILES[1], metadata={"format": "pt", _HEADER: json.dumps(said)})
    write_json(folder / FILES[0], _configuration(model, adapted))


def _configuration(model: nn.Module, adapted: dict[str, Adapted]) -> dict[str, Any]:
    options: dict[str, Any] = {name: module.adapter.options for name, module in adapted.items()}
    ranks = {name: one.rank for name, one in options.items()}
    alphas = {name: 2 * one.rank if one.alpha is None else one.alpha for name, one in options.items()}
    dropouts = Counter(one.dropout for one in options.values())
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    first = next(iter(options.values()))
    # The class decides: a bare LlamaModel, too, has a configuration whose "architectures" name a causal model.
    kind = type(getattr(model, "_orig_mod", model)).__name__
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
        "fan_in_fan_out": all(type(module.base).__name__ == "Conv1D" for module in adapted.values()),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_dora": first.magnitude,
        "use_rslora": first.rank_stabilised,
    }


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _exactly(name: str) -> str:
    """A pattern for ``name`` and no other; without the first sign, PEFT would take names that end like this, too."""
    return f"^{re.escape(name)}"


def _targets(model: nn.Module, adapted: dict[str, Adapted]) -> list[str] | str:
    """The shortest description that PEFT, which matches names by their ends, reads as exactly these modules."""
    wanted = set(adapted)
    inside = {id(inner) for module in adapted.values() for inner in module.modules()}  # the module itself, too
    others = [name_on_disk(name) for name, module in model.named_modules() if id(module) not in inside]
    tails = {name.rsplit(".", 1)[-1] for name in wanted}
    for candidate in (tails, wanted):
        if not any(end in candidate for name in others for end in _ends(name)):
            return sorted(candidate)
    return "|".join(re.escape(name) for name in sorted(wanted))


def _ends(name: str) -> list[str]:
    """``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``."""
    parts = name.split(".")
    return [".".join(parts[place:]) for place in range(len(parts))]


def load(folder: Path) -> dict[str, StoredAdapter]:
    """What is stored of each module.

    Raises AdapterError for a damaged file, for anything but LoRA and DoRA, and for settings that we do not have: each
    is named.
    """
    path = folder / FILES[0]
    config = read_description(path)
    _refuse(path, config)
    weights = folder / FILES[1]
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder}: the weights are a pickle (adapter_model.bin), which could run code when read. Load and "
            "save the adapter once with PEFT (safe_serialization=True) where you trust it"
        )
    tensors, header = read_tensors(weights)
    modules = _modules(weights, tensors)
    try:
        said = parse_description(header[_HEADER]) if _HEADER in header else None
        theirs = _options(config, list(modules))
        ours = theirs if said is None else {name: _said(one) for name, one in said.items()}
    except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
        text = shown(" ".join(str(error).split()), 400)
        raise AdapterError(f"{path}: a damaged configuration ({type(error).__name__}: {text})") from None
    odd = [name for name in {**theirs, **ours} if _outputs(theirs.get(name)) != _outputs(ours.get(name))]
    if odd:
        raise AdapterError(
            f"{folder}: {FILES[0]} is not the one that {FILES[1]} was saved with; they differ at {len(odd)} modules, "
            f"such as {shown(odd[0])}: a save was interrupted, or one of the two was changed. Save the adapter again, "
            "or, to take both as they stand, load and save them once with PEFT"
        )
    return {name: StoredAdapter(*ours[name], found, base=found.pop(_BASE, None)) for name, found in modules.items()}


def _modules(weights: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``module -> our name of the tensor -> tensor``. Raises AdapterError for a tensor that has no place there."""
    modules: dict[str, dict[str, Tensor]] = {}
    own = {theirs: own for own, theirs in _TENSORS.items()}
    # Older PEFT releases called the magnitude's tensor ".weight", and some gave it a second axis.
    own |= {f"{_TENSORS['magnitude']}.weight": "magnitude", _BASE: _BASE}
    kinds = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(map(re.escape, own))})")
    for key, tensor in tensors.items():
        found = kinds.fullmatch(key)
        if found is None or own[found[2]] in modules.setdefault(found[1], {}):
            raise AdapterError(
                f"{weights}: unexpected tensor {shown(key)}; expected {_PREFIX}MODULE."
                f"{{{', '.join(_TENSORS.values())}}}, each once"
            )
        is_row = own[found[2]] == "magnitude" and tensor.squeeze().dim() <= 1
        modules[found[1]][own[found[2]]] = tensor.reshape(-1) if is_row else tensor
    return modules


def _refuse(path: Path, config: dict[str, Any]) -> None:
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
    """``module -> (method, options)`` as PEFT's configuration has them."""
    method = "dora" if config.get("use_dora") else "lora"
    ranks = _pattern(config.get("rank_pattern") or {}, config["r"])
    alphas = _pattern(config.get("alpha_pattern") or {}, config["lora_alpha"])
    common: dict[str, Any] = {
        "rank_stabilised": bool(config.get("use_rslora")),
        "dropout": float(config.get("lora_dropout") or 0.0),
    }
    kind = methods.options_class(method)
    return {name: (method, kind(**{"rank": ranks(name), "alpha": alphas(name), **common})) for name in names}


def _said(entry: dict[str, Any]) -> tuple[str, methods.Options]:
    """Method and options of one module in our header."""
    return entry["method"], methods.options_class(entry["method"])(**entry["options"])


def _outputs(said: tuple[str, methods.Options] | None) -> Any:
    """What of a module's options decides its outputs; anything else may differ between configuration and header."""
    if said is None or not isinstance(said[1], lora.Options):
        return None
    return said[1].rank, said[1].scale, said[1].magnitude, said[1].magnitude_axis


def _pattern(patterns: dict[str, Any], default: Any) -> Callable[[str], Any]:
    """PEFT's rule: the first key that matches the end of a module's name as a regular expression decides.

    Raises ValueError, here or in the call, for a key that is no regular expression, or one that takes too long.
    """
    if all(key == _exactly(re.sub(r"\\(.)", r"\1", key[1:])) for key in patterns):  # as we write them: whole names
        return lambda name: patterns.get(_exactly(name), default)
    compiled = []
    for key, value in patterns.items():
        # Counted repeats unfold into gigabytes when compiled, and name no module.
        if len(key) > _LONGEST_PATTERN or "{" in key:
            raise ValueError(f"the pattern {shown(key)} is too long, or counts repeats")
        try:
            re.compile(pattern := rf"(.*\.)?({key})$")  # the language that PEFT reads; regex has one of its own
            compiled.append((key, regex.compile(pattern), value))
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{shown(key)} is not a regular expression ({error})") from None
    end = time.monotonic() + _PATIENCE

    def decide(name: str) -> Any:
        for key, expression, value in compiled:
            try:
                if expression.match(name, timeout=max(end - time.monotonic(), 0.001)):
                    return value
            except TimeoutError:
                raise ValueError(f"the pattern {shown(key)} takes more than {_PATIENCE} seconds") from None
        return default

    return decide
