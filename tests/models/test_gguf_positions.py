"""Positions of a GGUF file are scaled as llama.cpp scales them, and what transformers leaves out of a file is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaForCausalLM, StableLmConfig

from run_fixtures import own_cache
from tiny_gguf import HEADS, HIDDEN, write_gguf
from trimtab.errors import ModelError
from trimtab.models.gguf import _complete, dequantised_folder, gguf_config

__all__ = ["own_cache"]

HALF = HIDDEN // HEADS // 2
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


def divided(factor: float, theta: float) -> Any:
    """By what llama.cpp's converter has each frequency of a Llama 3.1 divided (``conversion/llama.py``)."""
    found = []
    for number in range(HALF):
        wave = 2 * math.pi * theta ** (number / HALF)
        share = (8192 / wave - 1.0) / (4.0 - 1.0)
        found.append(1 if wave < 8192 / 4 else factor if wave > 8192 else 1 / ((1 - share) / factor + share))
    return np.array(found, dtype=np.float32)


def llama3(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", divided(8.0, 10000.0))


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


def unscaled(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(HALF, dtype=np.float32))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (llama3, LLAMA3),
        (linear, {"rope_type": "linear", "factor": 4.0}),
        (yarn, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        (unscaled, {"rope_type": "default"}),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_positions_are_scaled_as_the_file_says(
    more: Callable[[gguf.GGUFWriter], None], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", more=more)
    config = gguf_config(tmp_path / "tiny.gguf")
    assert config.rope_parameters == {**expected, "rope_theta": 10000.0}
    model.config.rope_parameters = {**expected, "rope_theta": 10000.0}
    scaled = LlamaForCausalLM(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(dequantised_folder(tmp_path / "tiny.gguf"))
    ids = torch.arange(5, 105)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, scaled(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("more", "without", "said"),
    [
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.linspace(1, 3, HALF, dtype="f4")), "-", "Llama 3"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "-", "not known here .longrope"),
        (lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(HIDDEN, dtype="f4")), "-", "leaves out 1 bias"),
        (None, "ffn_up", "finds no tensor for 2 parameters of a LlamaForCausalLM, such as model.layers.0.mlp.up_proj"),
    ],
    ids=["frequencies", "kind", "bias", "missing"],
)
def test_what_would_be_left_out_in_silence_is_refused(more: Any, without: str, said: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", more=more, without=without)
    with pytest.raises(ModelError, match=said):
        dequantised_folder(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(("layers", "expected"), [(26, 256), (46, 144)], ids=["2B", "27B"])
def test_gemma_divides_queries_as_llama_cpp_does(layers: int, expected: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    config = Gemma2Config(hidden_size=4608, num_attention_heads=32, head_dim=256, num_hidden_layers=layers)
    config.query_pre_attn_scalar = 1
    _complete(config, gguf.GGUFReader(tmp_path / "tiny.gguf"), tmp_path / "tiny.gguf")
    assert config.query_pre_attn_scalar == expected


def test_as_much_of_a_head_is_turned_as_the_file_says(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    config = StableLmConfig(hidden_size=HIDDEN, num_attention_heads=HEADS // 2)  # heads of twice the width
    _complete(config, gguf.GGUFReader(tmp_path / "tiny.gguf"), tmp_path / "tiny.gguf")
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
