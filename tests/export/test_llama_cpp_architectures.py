"""The table of architectures in ``export/gguf_lora.py``, held against llama.cpp: a tiny random model of each is written
as a GGUF file with the table's names and orders of rows, and llama.cpp has to compute what transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_gguf import SPECIAL, TOKENS
from trimtab.errors import ModelError
from trimtab.export import _gguf_file as files
from trimtab.export.gguf import _untied
from trimtab.export.gguf_lora import _ARCHITECTURES, order_of

HIDDEN, HEADS, KEYS, INNER = 64, 4, 2, 96
PROMPTS = [[5, 40, 60, 7, 80, 33], [9, 12, 100, 200, 4], [70, 71, 72], [30, 31, 200, 201, 9, 8], [250, 3], [90, 17]]
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 128, "n_inner": INNER},
    "gemma2": {"query_pre_attn_scalar": HIDDEN // HEADS, "sliding_window": 64},
    "gemma3_text": {"query_pre_attn_scalar": HIDDEN // HEADS, "sliding_window": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "mistral": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 128},
}


def tiny(kind: str) -> Any:
    """A random model of that type."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **OWN.get(kind, {})})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that would hide a mistake
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif kind == "gpt2":
                parameter.mul_(1.0 if "wpe" in name else 1.5)
    return model


def write(path: Path, model: Any) -> None:
    """The model as a GGUF file, by the table."""
    config = model.config
    architecture, _ = _ARCHITECTURES[config.model_type]
    names = files.tensor_names(architecture, 2, path)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS if architecture == "gpt2" else KEYS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_value_length(HIDDEN // HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(getattr(config, "rms_norm_eps", 1e-6)))
    writer.add_layer_norm_eps(float(getattr(config, "layer_norm_epsilon", getattr(config, "norm_epsilon", 1e-5))))
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "mixtral":
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            number = name.split(".")[2]
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                writer.add_tensor(f"blk.{number}.ffn_{part}_exps.weight", np.ascontiguousarray(half))
            continue
        if name.endswith("experts.down_proj"):
            writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", values)
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        if architecture.startswith("gemma") and there.split(".")[-2].endswith("norm"):
            values = values + 1
        if architecture == "gpt2" and values.ndim == 2 and ".h." in name:
            values = values.T
        order = order_of(there, config)
        writer.add_tensor(there, np.ascontiguousarray(order.there(values)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("kind", "has_head"), [("gemma", False), ("gemma2", False), ("gemma3_text", True)])
def test_a_changed_embedding_is_refused_where_the_head_cannot_have_a_matrix_of_its_own(
    kind: str, has_head: bool, tmp_path: Path
) -> None:
    model = tiny(kind)
    write(tmp_path / "model.gguf", model)
    file, held = files.GgufFile(tmp_path / "model.gguf"), files.parameters(model)
    places = {"model.embed_tokens.weight": files.Place("token_embd.weight", files.Order())}
    if has_head:
        assert _untied("model.embed_tokens", places, held, file)["lm_head.weight"].tensor == "output.weight"
        return
    with pytest.raises(ModelError, match=f"one matrix for the embedding and the output head of every {kind}"):
        _untied("model.embed_tokens", places, held, file)


QUICK = ("gemma", "granite", "qwen2")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.full) for kind in sorted(_ARCHITECTURES)]
)
def test_llama_cpp_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    model = tiny(kind)
    write(tmp_path / "model.gguf", model)
    said = xllamacpp.CommonParams()
    said.model.path, said.n_ctx, said.n_parallel, said.warmup = str(tmp_path / "model.gguf"), 64, 1, False
    said.cpuparams.n_threads = said.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(said)
    compared = 0
    for prompt in PROMPTS:
        asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "n_probs": 20, "cache_prompt": False}
        answer = server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if not answer["choices"][0]["logprobs"]:  # an end token came first, of which nothing is told
            continue
        compared += 1
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
        assert max(abs(one["logprob"] - float(expected[one["id"]])) for one in top) < 2e-2
    assert compared > 1
