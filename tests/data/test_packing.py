"""Rows that lie one behind the other: the same loss and gradients as padded ones, and nothing of a row in another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM

from evaluation_cases import gpt2, llama
from trimtab.data.batches import Collator
from trimtab.data.packing import PackingCollator
from trimtab.models.causal_head import IGNORED
from trimtab.tasks import find

SIZES: dict[str, Any] = {"vocab_size": 360, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64}
ROWS: list[Any] = [
    {"input_ids": [7, 8, 9, 10, 11], "labels": [IGNORED, IGNORED, 9, 10, 11]},
    {"input_ids": [20, 21], "labels": [20, 21]},
    {"input_ids": [30, 31, 32, 33, 34, 35, 36], "labels": [IGNORED] * 5 + [35, 36]},
    {"input_ids": [40], "labels": [40]},
]


def qwen3(**changes: Any) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "num_key_value_heads": 1, "head_dim": 8, **changes}))


def neox(**changes: Any) -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, **changes}))


def test_a_batch_is_one_row_without_padding() -> None:
    batch = PackingCollator(prompts=True, flash=True)(ROWS)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10, 11, 20, 21, 30, 31, 32, 33, 34, 35, 36, 40]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5, 6, 0]]
    # A label is predicted from the token before it, and before the first of a row is the end of another.
    assert batch["labels"].tolist() == [[-100, -100, 9, 10, 11, -100, 21, *[-100] * 5, 35, 36, -100]]
    assert batch["prompt_labels"].tolist() == [[-100, 8, *[-100] * 6, 31, 32, 33, 34, *[-100] * 3]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 7, 14, 15]
    assert (batch["max_length_q"], batch["max_length_k"]) == (7, 7)
    assert set(PackingCollator()(ROWS)) == {"input_ids", "labels", "label_positions", "position_ids"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2, qwen3, neox])
@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_the_loss_and_its_gradients_are_those_of_padded_rows(make: Any, attention: str, prompt_weight: float) -> None:
    torch.manual_seed(0)
    model = make().double()
    model.set_attn_implementation(attention)
    task = find("causal_lm")
    head = task.head(model)
    found = []
    for collate in (Collator(0, prompts=prompt_weight > 0), PackingCollator(prompts=prompt_weight > 0)):
        batch = collate(ROWS)
        count = int((batch["labels"][:, 1:] != IGNORED).sum())  # as transformers' Trainer counts
        loss = task.loss(head, batch, count=count, prompt_weight=prompt_weight)
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    (padded, wanted), (packed, got) = found
    exact = 1e-12 if attention == "sdpa" else 1e-6  # eager attention has its softmax in float32
    torch.testing.assert_close(packed, padded, rtol=exact, atol=0)
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=exact * float(other.abs().max() + 1))


def test_other_tasks_have_their_rows_apart() -> None:
    assert find("seq2seq").packer(None) is None
    assert find("sequence_classification").packer(None) is None
