"""A merged model says what it is by the names that older programs look for, and to transformers it says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tiny_runs import tiny_tokenizer
from trimtab.export._older_names import use_older_names
from trimtab.export.merged import save
from trimtab.files import read_json, write_json
from trimtab.models.locate import Source

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 256, "initializer_range": 0.2},
    **{"pad_token_id": 1, "eos_token_id": 0},
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.0, 3.0]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# As files on the hub have them.
OLDER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"rope_theta": 500000.0}),
    ("llama", {}, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    ("phi3", {"original_max_position_embeddings": 64}, {"rope_theta": 20000.0, "rope_scaling": LONG}),
    ("gpt_neox", {}, {"rotary_emb_base": 20000, "rotary_pct": 0.5}),
    ("stablelm", {}, {"rope_theta": 20000.0, "partial_rotary_factor": 0.5}),
    ("gemma3_text", {"sliding_window": 16}, {"rope_theta": 1e6, "rope_local_base_freq": 20000.0}),
    ("qwen3_moe", EXPERTS, {"rope_theta": 1e6, "num_experts": 4}),
]


def base_of(kind: str, folder: Path, more: dict[str, Any]) -> tuple[Any, Source]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model, Source(folder.name, "folder", str(folder))


@pytest.mark.parametrize(("kind", "sizes", "older"), OLDER, ids=[f"{kind}-{len(older)}" for kind, _, older in OLDER])
def test_the_names_of_the_base_stay(kind: str, sizes: dict[str, Any], older: dict[str, Any], tmp_path: Path) -> None:
    _, base = base_of(kind, tmp_path / "base", sizes)
    said = read_json(tmp_path / "base" / "config.json")
    for name in ("rope_parameters", "dtype", *older):
        said.pop(name, None)
    write_json(tmp_path / "base" / "config.json", {**said, **older, "torch_dtype": "float32"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    (tmp_path / "out").mkdir()
    save(model, tiny_tokenizer(), tmp_path / "out", base=base)
    written = read_json(tmp_path / "out" / "config.json")
    assert {name: written.get(name) for name in older} == older
    assert written["torch_dtype"] == "float32"
    again = AutoConfig.from_pretrained(tmp_path / "out")
    assert again.rope_parameters == model.config.rope_parameters
    ids = torch.arange(5, 105)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, model(ids).logits)


def test_they_follow_from_the_new_ones_where_the_base_has_none(tmp_path: Path) -> None:
    model, base = base_of("llama", tmp_path / "base", {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}})
    (tmp_path / "out").mkdir()
    save(model, tiny_tokenizer(), tmp_path / "out", base=base)
    written = read_json(tmp_path / "out" / "config.json")
    assert (written["rope_theta"], written["rope_scaling"]) == (500000.0, LLAMA3)


@pytest.mark.parametrize("kind", ["gemma4_text", "lfm3", "deepseek_v4", "beam"])
def test_a_configuration_that_does_not_take_them_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind)
    for folder in ("base", "out"):
        config.save_pretrained(tmp_path / folder)
    before = read_json(tmp_path / "out" / "config.json")
    use_older_names(config, tmp_path / "out", Source("base", "folder", str(tmp_path / "base")))
    assert read_json(tmp_path / "out" / "config.json") == before


def test_mlx_lm_turns_positions_as_the_model_does(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    loading = pytest.importorskip("mlx_lm.utils")
    model, base = base_of("llama", tmp_path / "base", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    (tmp_path / "out").mkdir()
    save(model, tiny_tokenizer(), tmp_path / "out", base=base)
    ids = list(range(5, 105))
    theirs, _ = loading.load_model(tmp_path / "out")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(np.array(theirs(mx.array([ids]))), expected, atol=2e-4)


def test_the_tokenizer_is_called_as_before(tmp_path: Path) -> None:
    model, base = base_of("llama", tmp_path / "base", {})
    (tmp_path / "out").mkdir()
    save(model, tiny_tokenizer(), tmp_path / "out", base=base)
    said = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & said.keys()
    again, expected = AutoTokenizer.from_pretrained(tmp_path / "out"), tiny_tokenizer()
    text = "fog <|im_start|> noon"
    assert again(text).input_ids == expected(text).input_ids
    assert again.all_special_tokens == expected.all_special_tokens
