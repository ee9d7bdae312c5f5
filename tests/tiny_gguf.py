"""A tiny GGUF file, as llama.cpp writes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KEY_HEADS, HIDDEN, INTERMEDIATE = 4, 2, 64, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGED = ["ĠĠ", "ab"]
TOKENS = SPECIAL + ALPHABET + MERGED
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _as_llama_cpp_orders_it(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp pairs neighbouring rotary dimensions, transformers the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path, pre: str = "smollm", *, more: Callable[[gguf.GGUFWriter], None] | None = None, without: str = "-"
) -> LlamaForCausalLM:
    """A tiny Llama with Q4_1 blocks, as llama.cpp writes one; gives the model with the values the blocks stand for.
    ``more`` adds to the file; tensors with ``without`` in their names are left out."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        vocab_size=len(TOKENS),
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, module: Any, heads: int | None = None) -> None:
        if without in name:
            return
        kind = gguf.GGMLQuantizationType.Q4_1
        weight = module.weight.detach().numpy()
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
            return
        values = gguf.dequantize(gguf.quantize(weight, kind), kind)
        module.weight.data = torch.from_numpy(values.copy())
        ordered = weight if heads is None else _as_llama_cpp_orders_it(weight, heads)
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(ordered), kind), raw_dtype=kind)

    add("token_embd.weight", model.model.embed_tokens)
    add("output_norm.weight", model.model.norm)
    for number, layer in enumerate(model.model.layers):
        add(f"blk.{number}.attn_norm.weight", layer.input_layernorm)
        add(f"blk.{number}.ffn_norm.weight", layer.post_attention_layernorm)
        for name, short in NAMES.items():
            heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(short)
            add(f"blk.{number}.{short}.weight", layer.get_submodule(name), heads)
    if more is not None:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
