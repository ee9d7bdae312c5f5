"""Makes a tiny configuration of any architecture of transformers, by the names that its sizes have.

Configurations of 800 kinds agree on little but names: ``hidden_size``, ``d_model`` and ``n_embd`` are one thing. A
table of patterns gives each its tiny value; configurations inside a configuration are made tiny in the same way. What
that does not fit is said in ``tiny_overrides.py``.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import PretrainedConfig

WIDTH, HEADS, HEAD, KEY_HEADS, LAYERS, TOKENS, POSITIONS = 32, 4, 8, 2, 2, 128, 64
IMAGE, PATCH, MELS, LABELS = 32, 8, 16, 3
SPECIAL = 20
"""Ids below this stand for special tokens; ordinary text has none of them."""

# The first pattern that matches the whole name decides. A size is only ever made smaller.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?|n_tokens?|vocabulary_size|.*codebook_size|n_codes|num_embeddings", TOKENS),
    (r"(.*rotary_dim|.*rope_dim)", 4),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 2 * WIDTH // HEAD),
    (r"mamba_n_groups", 1),
    (r"(.*_)?(head_dim|head_size|d_kv|d_head|attention_head_dim|kv_channels|.*head_dim)(_.*)?", HEAD),
    (
        r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|num_query_groups|kv_heads|n_kv_heads|num_global_key_value_heads)",
        KEY_HEADS,
    ),
    (r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|.*_heads)", HEADS),
    (r"(.*_)?(q_lora_rank|kv_lora_rank|.*_lora_rank|.*_low_rank_dim|.*_rank)", 8),
    (
        r"(.*_)?(moe_intermediate_size|expert_ffn_.*|.*intermediate_.*size|intermediate_dim|intermediate_size.*|.*ffn_dim|d_ff|d_ffn|ffn_hidden_size|mlp_dim|n_inner|.*inner_dim|ff_dim|.*ffn_size|.*feedforward.*|d_inner|mlp_hidden_size|ffn_embed_dim|.*_ffn|dim_ff|.*_intermediate|mlp_hidden_dim)",
        64,
    ),
    (
        r"(.*_)?(num_hidden_layers|n_layers?|num_layers|.*_layers|depth|num_blocks|num_hidden_blocks|.*_layer_num)",
        LAYERS,
    ),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|.*_num_experts|n_experts)", 4),
    (
        r"(.*_)?(num_experts_per_tok|num_experts_per_token|moe_topk|moe_top_k|top_k_experts|.*experts_per_tok|moe_k|num_selects)",
        2,
    ),
    (r"(n_group|topk_group)", 1),
    (
        r"(.*_)?(max_position_embeddings|n_positions|max_\w*positions|n_ctx|max_seq_len|max_sequence_length|max_target_length|max_source_length|context_length_text|block_size|seq_length|max_len)",
        POSITIONS,
    ),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_size|emb_dim|embedding_dim|dim|width|dim_model|model_dim|projection_dim|hidden_channels|.*_hidden_size|.*_embed_dim|.*_embedding_dim|.*_dim|.*hidden_size.*|.*embed_dims?|.*_width|channels|.*_channels|proj_size|conv_dim|.*_embedding_size|embeddings_size|.*_size_per_layer_input|hidden_size_per_layer.*)",
        WIDTH,
    ),
    (r"(.*_)?window_size", 4),
    (r"(.*_)?(num_groups|group_norm_num_groups)", HEAD),
    (r"(.*_)?(sliding_window|attention_window|local_radius|chunk_size|.*chunk_size|chunk_length|window)", 8),
    (r"(.*_)?(num_mel_bins|feature_size|n_mels|input_feat_per_channel|num_mel_bands|mel_bins)", MELS),
    (r"(.*_)?(ssm_state_size|state_size|mamba_d_state|d_state|state_dim)", 8),
    (r"(.*_)?(max_source_frames|num_frames|frames|tubelet_size)", 4),
    (
        r"(.*_)?(num_queries|num_query_tokens|num_latents|.*_num_latents|query_length|num_learnable_queries|.*_queries|d_latents|num_proposals)",
        8,
    ),
    (r"type_vocab_size", 2),
)
# Sizes by which something else is divided, or that have a meaning of their own: they stay as they are.
_KEPT = re.compile(
    r"num_channels|in_channels|in_chans|num_labels|type_vocab_size|out_channels|temporal_.*|.*_factor|.*_ratio|num_image_channels"
    r"|num_codebooks|.*_kernel.*|.*_stride.*|n_groups|.*conv_groups|num_mask_units|use_.*|.*_type|.*_act|.*_norm|rotary_pct|audio_channels"
)
_PATTERNS = tuple((re.compile(pattern), size) for pattern, size in _SIZES)
_TOKEN = re.compile(
    r"(.*_)?(token_id|token_index|token_ids|_idx)|(bos|eos|pad|sep|cls|mask|unk|img)(_token|_index|_idx)\w*"
)


def tiny(config_class: type[PretrainedConfig], override: dict[str, Any] | None = None) -> PretrainedConfig:
    """A configuration of ``config_class`` with tiny sizes; ``override`` has the last word, and may name an attribute of
    an inner configuration as ``text_config.num_layers``."""
    flat, inner = _split(override or {})
    try:
        start = config_class()
    except Exception:  # one that cannot be made without being told something
        start = config_class(**flat)
    return _shrunk(start, flat, inner, _Ids())


class _Ids:
    """Gives each special token an id of its own below SPECIAL."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def of(self, name: str) -> int:
        name = {"decoder_start_token_id": "bos_token_id", "forced_bos_token_id": "bos_token_id"}.get(name, name)
        name = {"forced_eos_token_id": "eos_token_id"}.get(name, name)
        return self.known.setdefault(name, min(len(self.known), SPECIAL - 1))


def _split(override: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    flat = {name: value for name, value in override.items() if "." not in name}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in override.items():
        if "." in name:
            first, _, rest = name.partition(".")
            inner.setdefault(first, {})[rest] = value
    return flat, inner


def _shrunk(config: Any, flat: dict[str, Any], inner: dict[str, dict[str, Any]], ids: _Ids) -> Any:
    values: dict[str, Any] = {}
    for name, value in _said(config).items():
        if name in flat:
            values[name] = flat[name]
        elif isinstance(value, PretrainedConfig):
            values[name] = _shrunk(value, *_split(inner.get(name, {})), ids)
        elif name.endswith("_config") and isinstance(value, dict) and name in inner:
            values[name] = {**value, **inner[name]}
        elif (small := _small(name, value, ids)) is not _SAME:
            values[name] = small
        elif value is not None and not callable(value):
            values[name] = value
    if values.get("qk_rope_head_dim") and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no groups
    if values.get("qk_head_dim") and values.get("qk_rope_head_dim"):
        values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    for name, value in values.items():
        if isinstance(value, dict) and value.get("mrope_section", 0) is None:
            half = int(values.get("head_dim", HEAD) * (value.get("partial_rotary_factor") or 1)) // 2
            values[name] = {**value, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    if isinstance(values.get("conv_dim"), list | tuple):
        values["num_feat_extract_layers"] = len(values["conv_dim"])
    _keep_outputs(config, values, flat)
    layers = next((values[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if values.get(name)), LAYERS)
    for name, value in values.items():
        if name not in flat and isinstance(value, list) and "layer" in name and len(value) > layers:
            values[name] = _variety(value, layers)
    values.update({name: value for name, value in flat.items() if name not in values})
    return type(config)(**values)


def _keep_outputs(config: Any, values: dict[str, Any], flat: dict[str, Any]) -> None:
    """A backbone gives as many of its layers' outputs as it gave, and has that many layers."""
    indices = getattr(config, "out_indices", None)
    if not indices or "out_indices" in flat:
        return
    if "depths" in values or "num_hidden_layers" not in values:
        values["out_indices"] = list(indices)
        return
    values["num_hidden_layers"] = layers = max(values["num_hidden_layers"], len(indices))
    values["out_indices"] = list(range(layers - len(indices) + 1, layers + 1))


def _said(config: Any) -> dict[str, Any]:
    """The values of a configuration's own fields, and those that its constructor has put beside them."""
    hidden = {"transformers_version", "architectures", "model_type", "_name_or_path", "dtype", "id2label", "label2id"}
    hidden |= {"output_hidden_states", "return_dict", "output_attentions", "chunk_size_feed_forward", "problem_type"}
    hidden |= {
        "ignore_keys_at_rope_validation",
        "per_layer_config",
        "out_features",
        "stage_names",
        "use_bfloat16",
        "is_heterogeneous",
    }
    names = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    names += [name for name in vars(config) if name not in names]
    mapped = getattr(type(config), "attribute_map", {}) or {}
    look = getattr(config, "_getattr_without_heterogeneous_validation", None) or (lambda name, _: getattr(config, name))
    values = {name: look(name, None) for name in names if name not in hidden and not name.startswith("_")}
    return {name: value for name, value in values.items() if name not in mapped or mapped[name] not in values}


_SAME = object()
# What some configurations leave to the checkpoint.
_MISSING = {"head_dim": HEAD, "num_key_value_heads": HEADS, "vocab_size": TOKENS, "prediction_length": 4}
_MISSING |= {
    "pad_token_id": 0,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


def _small(name: str, value: Any, ids: _Ids) -> Any:
    """The tiny value of one attribute; _SAME where it stays as it is."""
    if value is None:
        return _MISSING.get(name, _SAME)
    if isinstance(value, bool):
        return _SAME
    if isinstance(value, dict) and any("mrope_section" in str(key) for key in value):
        return {**value, "mrope_section": None}  # filled in when the other sizes are known
    if isinstance(value, float) and ("drop" in name):
        return 0.0
    if _TOKEN.fullmatch(name):
        if isinstance(value, int) and value >= 0:
            return ids.of(name)
        if isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
            return [ids.of(f"{name}.{place}") for place in range(len(value))] if len(value) < 5 else _SAME
        return _SAME
    if name in ("image_size", "img_size", "input_size", "pretrain_image_size"):
        return IMAGE if isinstance(value, int) else [IMAGE] * len(value) if isinstance(value, list | tuple) else _SAME
    if name == "patch_size":
        return PATCH if isinstance(value, int) else [PATCH] * len(value) if isinstance(value, list | tuple) else _SAME
    if _KEPT.fullmatch(name):
        return _SAME
    if isinstance(value, int):
        return next((min(value, size) for pattern, size in _PATTERNS if pattern.fullmatch(name)), _SAME)
    if isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
        return _small_list(name, list(value))
    return _SAME


def _small_list(name: str, value: list[int]) -> Any:
    """Sizes of stages: as many stages, each one small; they grow as far as the original ones did, by at most two."""
    if re.fullmatch(r"(.*_)?depths?|num_layers|.*_layers_per_stage|num_encoder_blocks|layers", name):
        return [min(one, 1) for one in value]
    if re.fullmatch(r"intermediate_size|num_key_value_heads|num_attention_heads|head_dim", name) and len(value) > 8:
        return next(min(value[0], size) for pattern, size in _PATTERNS if pattern.fullmatch(name))  # one for each layer
    if re.fullmatch(r"(.*_)?(num_attention_heads|num_heads|num_head)", name):
        return [min(one, 2) for one in value]
    if re.fullmatch(
        r"(.*_)?(hidden_sizes?|embed_dims?|channels|channels_list|widths|dims?|conv_dim|d_model|sizes)", name
    ):
        return [
            one if one < HEAD else HEAD * max(1, one // 64) for one in value
        ]  # one rule for lists that belong together
    return _SAME


def _variety(kinds: list[Any], count: int) -> list[Any]:
    """``count`` of the kinds of layers, in their order, and as many different ones as there is room for."""
    first = {str(kind): place for place, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())[:count]
    rest = [place for place in range(len(kinds)) if place not in chosen]
    return [kinds[place] for place in sorted(chosen + rest[: count - len(chosen)])]
