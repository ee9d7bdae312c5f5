"""How long a text a model can read, held against the models themselves: the last length that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab.models.positions import Positions, positions_of

LIMIT = 23
SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OLD = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LIMIT}
NEW = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LIMIT,
}
TABLES: dict[str, dict[str, Any]] = {
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gptj": {**OLD, "rotary_dim": 4},
    "codegen": {**OLD, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": {**NEW, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    "opt": {**NEW, "ffn_dim": 20, "word_embed_proj_dim": 16},
    "biogpt": NEW,
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": LIMIT},
    "roberta": {**NEW, "is_decoder": True, "max_position_embeddings": LIMIT + 2, "pad_token_id": 1},
}
FREE: dict[str, dict[str, Any]] = {
    "llama": NEW,
    "gemma": {**NEW, "head_dim": 8},
    "phi": NEW,
    "falcon": {**NEW, "alibi": True, "new_decoder_architecture": False},
    "xglm": {"d_model": 16, "ffn_dim": 20, "num_layers": 1, "attention_heads": 2, "max_position_embeddings": LIMIT},
}


def model(kind: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **sizes})).eval()


def reads(model: Any, length: int) -> bool:
    ids = torch.arange(length)[None] % 30 + 5
    try:
        model(input_ids=ids, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_positions_is_found_and_its_end_is_where_the_model_fails(kind: str) -> None:
    made = model(kind, TABLES[kind])
    assert positions_of(made).table == LIMIT
    with torch.device("meta"):
        assert positions_of(model(kind, TABLES[kind])).table == LIMIT
    assert reads(made, LIMIT)
    assert not reads(made, LIMIT + 1)


@pytest.mark.parametrize("kind", FREE)
def test_a_model_without_a_table_reads_on(kind: str) -> None:
    made = model(kind, FREE[kind])
    found = positions_of(made)
    assert found.table is None
    assert found.trained in (LIMIT, 2048)  # Falcon's biases know no limit, and its configuration has a default
    assert reads(made, 2 * LIMIT)


def test_how_far_a_text_is_read() -> None:
    assert [Positions(64, 60).limit(wanted) for wanted in (None, 32, 100)] == [60, 32, 60]
    assert [Positions(64).limit(wanted) for wanted in (None, 32, 100)] == [64, 32, 100]
    assert [Positions().limit(wanted) for wanted in (None, 32)] == [None, 32]
