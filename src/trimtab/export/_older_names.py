"""What a model folder says by its new names, said by the older ones, too, for programs that look for those.

transformers 5 put the settings of rotary positions together (``rope_parameters``) and calls the dtype ``dtype``. What
reads a configuration as it was before, such as transformers 4 or mlx-lm 0.32, finds no ``rope_theta`` and takes its own
default, so that it computes something else without a word. The names of tokenizers changed, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from trimtab.files import read_json, write_json
from trimtab.models.load import side_files
from trimtab.models.locate import Source

_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_emb_base", "rotary_pct")
_OWN = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
}
"""What a kind of model calls them, where it has names of its own."""


def use_older_names(config: PretrainedConfig, folder: Path, base: Source) -> None:
    """Add to ``folder/config.json``, which holds ``config``, the older names of what it says: as the base's own file
    has them, and where it has none, as they follow from the new ones. Left out if transformers would then read
    something else."""
    file = folder / "config.json"
    origin = side_files(base) if base.kind != "gguf" else None
    before = read_json(origin / file.name) if origin is not None and (origin / file.name).is_file() else {}
    said, kind = read_json(file), type(config)
    try:
        plain = kind.from_pretrained(folder).to_dict()
        write_json(file, dict(sorted(_with_older(said, before, config).items())))
        again = kind.from_pretrained(folder).to_dict()
        same = all(again.get(name) == value for name, value in plain.items())
    except Exception:  # whatever a configuration raises that does not take them
        same = False
    if not same:
        write_json(file, said)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``tokenizer`` with the older names in place of the new ones: transformers 5 reads both, and 4 would refuse
    those."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if not file.is_file():  # it reads pictures
        return
    said = {name: value for name, value in read_json(file).items() if name not in ("is_local", "local_files_only")}
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(said.get("extra_special_tokens"), list):
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    write_json(file, said)


def _with_older(said: Mapping[str, Any], before: Mapping[str, Any], config: Any) -> dict[str, Any]:
    own = _OWN.get(str(said.get("model_type")), {})
    older = {own.get(name, name): value for name, value in _rotary(said.get("rope_parameters")).items()}
    older |= {name: before[name] for name in (*_ROPE, *own.values()) if before.get(name) is not None}
    other = getattr(config, "attribute_map", {})
    older |= {name: said[now] for name, now in other.items() if name in before and now in said}
    older |= {"torch_dtype": said["dtype"]} if said.get("dtype") else {}
    within = {
        name: _with_older(value, before.get(name) or {}, getattr(config, name))
        for name, value in said.items()
        if isinstance(value, dict) and isinstance(getattr(config, name, None), PretrainedConfig)
    }
    return {**older, **said, **within}


def _rotary(said: Any) -> dict[str, Any]:
    """``rope_parameters`` by the older names: one set for all layers, or one for those that see all positions and one
    for those with a window."""
    if not isinstance(said, dict):
        return {}
    wide = said.get("full_attention") or said
    theta, kind = wide.get("rope_theta"), wide.get("rope_type", "default")
    if theta is None:
        return {}
    found = {"rope_theta": theta}
    if (share := wide.get("partial_rotary_factor")) is not None:
        found["partial_rotary_factor"] = share
    if kind != "default":
        apart = ("rope_theta", "partial_rotary_factor")
        found["rope_scaling"] = {name: value for name, value in wide.items() if name not in apart}
    narrow = said.get("sliding_attention")
    if isinstance(narrow, dict) and "rope_theta" in narrow:
        found["rope_local_base_freq"] = narrow["rope_theta"]
    return found
