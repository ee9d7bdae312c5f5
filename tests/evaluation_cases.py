"""Examples, random models whose logits differ, and a Markov chain, for the evaluation tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trimtab.data.rows import Example


def example(prompt: str, answer: str | None, number: int = 1, text: str | None = None) -> Example:
    """A row as `trimtab.data.rows` makes it: with an answer, or a plain text."""
    if answer is None:
        assert text is not None
        return Example("rows.jsonl", number, text, ((0, len(text)),), "", None, True)
    whole = prompt + answer
    return Example("rows.jsonl", number, whole, ((len(prompt.rstrip(" ")), len(whole)),), prompt, answer, True)


def llama(vocabulary: int = 360, **changes: Any) -> LlamaForCausalLM:
    """Random weights ten times larger than usual, or all log-probabilities would be about the same."""
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def gpt2(vocabulary: int = 360, **changes: Any) -> GPT2LMHeadModel:
    """The same for learned positions, biases and tied embeddings."""
    sizes = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.2}
    torch.manual_seed(1)
    config = GPT2Config(**{**sizes, **quiet, "eos_token_id": 0, "bos_token_id": 0, **changes})
    return GPT2LMHeadModel(config).eval()


def markov_chain(tokenizer: Any, follows: Mapping[int, int], vocabulary: int = 360) -> LlamaForCausalLM:
    """A Llama that writes token ``follows[t]`` after token ``t``, whatever came before (token 5 where nothing is said).

    Its blocks add nothing, its embeddings are one-hot, and its head holds the chain.
    """
    model = llama(vocabulary, hidden_size=vocabulary, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary))
        model.lm_head.weight.zero_()
        for token in range(vocabulary):
            model.lm_head.weight[follows.get(token, 5), token] = 1.0
    return model
