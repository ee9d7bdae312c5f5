"""What PEFT can say in a configuration and we cannot do, each in words."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from trimtab.adapters.safe_read import shown
from trimtab.errors import AdapterError, TrimtabWarning

# Settings of a PEFT configuration that change what the adapter computes, and that we do not support.
_REFUSED = {
    "layer_replication": "a base with repeated layers",
    "alora_invocation_tokens": "aLoRA, an adapter that switches on at certain tokens",
    "use_qalora": "QA-LoRA, whose input is pooled",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow, which routes each token to one of several adapters",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's parallel layers",
}
# All other settings of PEFT's releases up to 0.21, those that are read and those that outputs do not depend on.
_KNOWN = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "use_dora", "qalora_group_size", "runtime_config", "lora_bias"),
    *("target_parameters", "ensure_weight_tying", "enable_lora", "merge_weights"),
}
# Initialisations that also change the base weights, so that the adapter is useless on the original ones.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Of these, the ones that PEFT repeats exactly when it loads the adapter.
_REPEATABLE = ("pissa", "olora")
_METHODS = {
    "ADALORA": "AdaLoRA, whose update is P diag(E) Q",
    "XLORA": "X-LoRA, which mixes several LoRA adapters by the input",
    "POLY": "Poly, which mixes several LoRA adapters by the task",
    "VERA": "VeRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "IA3": "(IA)^3",
    "OFT": "OFT",
    "BOFT": "BOFT",
    "PROMPT_TUNING": "prompt tuning, which has no update of a weight",
    "PREFIX_TUNING": "prefix tuning, which has no update of a weight",
    "P_TUNING": "P-tuning, which has no update of a weight",
    "TRAINABLE_TOKENS": "trained tokens alone",
}


def refuse(path: Path, config: dict[str, Any]) -> None:
    """Raise AdapterError for a configuration that asks for something that we do not support."""
    kind = config.get("peft_type")
    if kind is None:
        raise AdapterError(
            f"{path}: it has no peft_type, so it is no configuration of PEFT's (mlx-lm, for one, writes a file of that "
            "name, too). Adapters in PEFT's format and in trimtab's own can be loaded"
        )
    if kind != "LORA":
        known = _METHODS.get(kind, "") if isinstance(kind, str) else ""
        raise AdapterError(
            f"{path}: peft_type is {shown(kind)}{f' ({known})' if known else ''}; only LORA (with or without use_dora) "
            "can be loaded. Where PEFT can approximate it by LoRA: peft.save_as_lora(FOLDER, peft_model, rank=32)"
        )
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{path}: '{key}' is set ({meaning}), which is not supported")
    if unknown := [
        f"{shown(key)}: {shown(config[key])}" for key in config.keys() - _KNOWN - _REFUSED.keys() if config[key]
    ]:
        warnings.warn(
            f"{path}: settings that are not known here are passed over ({', '.join(sorted(unknown))}). If a newer PEFT "
            "computes something else by them, this adapter does not",
            TrimtabWarning,
            stacklevel=2,
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights is {shown(start)}, which changes the base weights, so the adapter means "
            "nothing on the original ones. Save it as plain LoRA where it was trained: peft_model.save_pretrained("
            "FOLDER, path_initial_model_for_weight_conversion=START), where START has the adapter as it was before "
            f"training{_without_the_start(start)}"
        )


def _without_the_start(start: str) -> str:
    if start.lower() not in _REPEATABLE:
        return ""
    return (
        ". From this folder alone: PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(MERGED) "
        "gives the whole model"
    )
