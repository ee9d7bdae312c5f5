"""How the positions of a model in a GGUF file are scaled, which transformers (5.23) passes over: a Llama 3.1 would turn
them as Llama 3 does, in silence.

llama.cpp has it in the head (``rope.scaling.*``; ``rope.dimension_count``: how much of a head is turned), or as the
numbers by which each frequency is divided: ``rope_freqs``, and ``rope_factors_short`` and ``rope_factors_long`` for
texts up to the length of the pretraining and beyond.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader
from transformers import PretrainedConfig

from trimtab.errors import ModelError

# How Llama 3.1, 3.2 and 3.3 are scaled but for the factor (their config.json).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def scale_positions(config: PretrainedConfig, reader: GGUFReader, file: Path) -> None:
    """Put into ``config``, which transformers read from ``file``, how its positions are scaled. Raises ModelError if
    transformers knows no such scaling."""
    text = config.get_text_config()
    said = getattr(text, "rope_parameters", None)
    rope = said.get("full_attention", said) if isinstance(said, dict) else {}
    if "partial_rotary_factor" in rope and (turned := _field(reader, "rope.dimension_count")):
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        rope["partial_rotary_factor"] = int(turned) / head
    if rope.get("rope_type", "default") != "default" or not rope.get("rope_theta"):
        return
    scaling = _scaling(text, float(rope["rope_theta"]), reader, file)
    rope.update(scaling)
    if "original_max_position_embeddings" in scaling and hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = scaling["original_max_position_embeddings"]


def _scaling(config: Any, theta: float, reader: GGUFReader, file: Path) -> dict[str, Any]:
    tensors = {
        one.name.removesuffix(".weight"): np.asarray(gguf.dequantize(one.data, one.tensor_type), dtype=np.float64)
        for one in reader.tensors
        if one.name.startswith(("rope_freqs", "rope_factors"))
    }
    kind, factor, trained = (
        _field(reader, f"rope.scaling.{name}") for name in ("type", "factor", "original_context_length")
    )
    if (divided := tensors.get("rope_freqs")) is not None:
        return _as_llama3(divided, theta, file)
    if tensors and trained:
        parts = {f"{one}_factor": tensors[f"rope_factors_{one}"].tolist() for one in ("short", "long")}
        factor = int(config.max_position_embeddings) / int(trained)
        return {"rope_type": "longrope", "factor": factor, "original_max_position_embeddings": int(trained), **parts}
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor:
        known = {"original_max_position_embeddings": int(trained)} if trained else {}
        return {"rope_type": "yarn", "factor": float(factor), **known}
    if tensors or kind not in (None, "none"):
        raise ModelError(
            f"{file}: its positions are scaled in a way that is not known here ({kind or ', '.join(tensors)}), and the "
            "model would compute something else. Take it as a model folder"
        )
    return {}


def _as_llama3(divided: np.ndarray[Any, Any], theta: float, file: Path) -> dict[str, Any]:
    """Llama 3's scaling, by which each frequency is ``divided``."""
    factor = float(divided.max())
    waves = 2 * math.pi * theta ** (np.arange(len(divided)) / len(divided))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    share = np.clip((_LLAMA3["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    if not np.allclose(divided, 1 / ((1 - share) / factor + share), rtol=1e-3):
        raise ModelError(
            f"{file}: its frequencies are divided by numbers that are not Llama 3's (rope_freqs), and the model would "
            "compute something else. Take it as a model folder"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3} if factor != 1 else {}


def _field(reader: GGUFReader, name: str) -> Any:
    architecture = reader.get_field("general.architecture")
    found = reader.get_field(f"{architecture.contents()}.{name}") if architecture is not None else None
    return found.contents() if found is not None else None
