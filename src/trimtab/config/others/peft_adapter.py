"""PEFT's ``adapter_config.json``: a rule for its modules, and one for each of ``modules_to_save``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trimtab.config.others._other import Carried, OtherConfig, globs
from trimtab.errors import ConfigError

_PLAIN = re.compile(r"[\w.]+")


class PeftAdapterConfig(OtherConfig):
    """What was adapted, and how. Rows and rates are not in such a file."""

    label = "PEFT"
    known_by = "peft_type"

    def knows(self, raw: Mapping[str, Any]) -> bool:
        return "peft_type" in raw

    def carry(self, carried: Carried) -> None:
        kind = carried.take("peft_type")
        if kind != "LORA":
            raise ConfigError(f"{carried.file}: peft_type {kind}: only LORA, with or without use_dora, is known here")
        carried.same({"base_model_name_or_path": "model.name", "revision": "model.revision"})
        options = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rank_stabilised"}
        rule = carried.low_rank(self._match(carried), options, "use_dora")
        rule.setdefault("alpha", 8)
        if layers := carried.take("layers_to_transform"):
            rule["layers"] = ",".join(map(str, layers if isinstance(layers, list) else [layers]))
        bias = carried.take("bias", "none")
        if bias == "lora_only":
            rule["bias"] = True
        elif bias != "none":
            carried.tell("bias", bias, "set bias: true on the rules whose layers are to train theirs")
        self._patterns(carried, rule)
        carried.whole(carried.take("modules_to_save") or [])
        start = carried.take("init_lora_weights", True)
        if start == "gaussian":
            rule.update(init="gaussian")
        elif start is not True:
            carried.tell("init_lora_weights", start, "here A is drawn at random, and B is zero")
        # What belongs to the format, and what is switched off.
        carried.forget(("auto_mapping", "inference_mode", "task_type", "peft_version", "fan_in_fan_out"))
        carried.forget([key for key, value in carried.left.items() if not value])

    def _match(self, carried: Carried) -> str | list[str]:
        said = carried.take("target_modules")
        if said == "all-linear":
            return "all-linear"
        if isinstance(said, list) and said:
            return globs(sorted(said))
        if isinstance(said, str):
            names = [name.replace("\\.", ".") for name in said.split("|")]
            if all(map(_PLAIN.fullmatch, names)):
                return names
        carried.tell("target_modules", said, "a pattern of its own; name the modules on the rule by globs")
        return "all-linear"

    def _patterns(self, carried: Carried, rule: Mapping[str, Any]) -> None:
        ranks, alphas = carried.take("rank_pattern") or {}, carried.take("alpha_pattern") or {}
        for key in dict.fromkeys([*ranks, *alphas]):
            name = key.removeprefix("^").replace("\\.", ".")
            if not _PLAIN.fullmatch(name):
                carried.tell("rank_pattern", key, "a pattern of its own; give the modules a rule by globs")
                continue
            match = name if key.startswith("^") else [name, f"*.{name}"]
            changed = {"rank": ranks.get(key, rule["rank"]), "alpha": alphas.get(key, rule["alpha"])}
            carried.rules.append({**rule, "match": match, **changed})
