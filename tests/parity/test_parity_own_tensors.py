"""Tensors of the model's own between PEFT and us: whole modules (``modules_to_save``), biases, resized embeddings. Both
ways, with the same outputs."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import trimtab
from adapter_tools import PEFT_FILES, assert_unchanged, read_json, state_of
from trimtab import AdapterError, Rule

IDS = torch.arange(3, 21).reshape(3, 6)
SMALL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _missing_tensors_are_errors() -> Iterator[None]:
    """PEFT only warns of tensors that it misses or does not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected|not initialized).*")
        yield


def roberta() -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    return RobertaForSequenceClassification(
        RobertaConfig(**sizes, intermediate_size=20, num_labels=4, max_position_embeddings=30, **SMALL)
    )


def bert() -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForTokenClassification(BertConfig(**sizes, intermediate_size=20, num_labels=5, **SMALL))


def gpt2() -> Any:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


def neox(**changes: Any) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes, "intermediate_size": 24, **changes}))


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(IDS).logits
        return logits


def stirred(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


FROM_PEFT: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "a head of two layers": (roberta, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "a head of one layer": (bert, {"task_type": "TOKEN_CLS", "target_modules": ["key"], "use_dora": True}),
    "a head without a bias": (gpt2, {"task_type": "SEQ_CLS", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "norms": (neox, {"target_modules": ["query_key_value"], "modules_to_save": ["layernorm", "final_layer_norm"]}),
    "a whole block": (neox, {"target_modules": ["query_key_value"], "modules_to_save": ["layers.1.mlp"]}),
    "a layer stored the other way round": (
        gpt2,
        {"target_modules": ["c_attn"], "modules_to_save": ["h.0.mlp.c_fc"], "fan_in_fan_out": True},
    ),
    "embedding and head": (neox, {"target_modules": ["dense"], "modules_to_save": ["embed_in", "lm_head"]}),
    "both, tied": (
        lambda: neox(tie_word_embeddings=True),
        {"target_modules": ["dense"], "modules_to_save": ["embed_in", "lm_head"]},
    ),
    "the embedding alone, tied": (
        lambda: neox(tie_word_embeddings=True),
        {"target_modules": ["dense"], "modules_to_save": ["embed_in"]},
    ),
    "biases of the layers": (roberta, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "all biases": (neox, {"target_modules": ["query_key_value"], "bias": "all", "use_dora": True}),
    "all biases and a head": (bert, {"task_type": "TOKEN_CLS", "target_modules": ["query"], "bias": "all"}),
}


@pytest.mark.parametrize("what", FROM_PEFT)
def test_a_folder_of_peft(what: str, tmp_path: Path) -> None:
    """Loaded, merged, and written again such that PEFT computes the same from it."""
    make, config = FROM_PEFT[what]
    base = make()
    theirs = stirred(get_peft_model(copy.deepcopy(base), LoraConfig(r=2, **config)))
    wanted = run(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    trimtab.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(run(ours), wanted, rtol=0, atol=3e-6)

    trimtab.save_adapter(ours, tmp_path / "ours")
    assert (tmp_path / "ours" / PEFT_FILES[0]).is_file()
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(run(again), wanted, rtol=0, atol=3e-6)
    same = copy.deepcopy(base)
    trimtab.load_adapter(same, tmp_path / "ours")
    torch.testing.assert_close(run(same), run(ours), rtol=0, atol=0)
    trimtab.merge(ours)
    torch.testing.assert_close(run(ours), wanted, rtol=0, atol=3e-6)
    trimtab.detach(same)
    torch.testing.assert_close(run(same), run(copy.deepcopy(base)), rtol=0, atol=0)


LAYERS = Rule(match="*.query", method="lora", rank=2)
BIASED = Rule(match="*.query", method="dora", rank=2, bias=True)
OURS: dict[str, tuple[Callable[[], Any], list[Rule], dict[str, Any]]] = {
    "a head": (
        roberta,
        [LAYERS, Rule(match="classifier", method="full")],
        {"modules_to_save": ["classifier"], "bias": "none"},
    ),
    "one layer of the head": (
        roberta,
        [LAYERS, Rule(match="classifier.dense", method="full")],
        {"modules_to_save": ["classifier.dense"], "bias": "none"},
    ),
    "biases": (roberta, [BIASED], {"modules_to_save": None, "bias": "lora_only"}),
    "biases of norms": (
        bert,
        [BIASED, Rule(match="*.LayerNorm", method="full", tensors=["bias"])],
        {"modules_to_save": None, "bias": "all"},
    ),
    "norms of a block": (
        roberta,
        [LAYERS, Rule(match="*.LayerNorm", layers="1", method="full")],
        {
            "modules_to_save": [
                "roberta.encoder.layer.1.attention.output.LayerNorm",
                "roberta.encoder.layer.1.output.LayerNorm",
            ],
            "bias": "none",
        },
    ),
}


@pytest.mark.parametrize("what", OURS)
def test_a_folder_of_ours(what: str, tmp_path: Path) -> None:
    make, rules, said = OURS[what]
    base = make()
    ours = copy.deepcopy(base)
    trimtab.attach(ours, rules)
    stirred(ours)
    trimtab.save_adapter(ours, tmp_path)
    config = read_json(tmp_path / PEFT_FILES[0])
    assert {key: config[key] for key in said} == said
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(run(theirs), run(ours), rtol=0, atol=3e-6)


NOT_THEIRS: dict[str, list[Rule]] = {
    "a weight without its bias": [LAYERS, Rule(match="classifier.dense", method="full", tensors=["weight"])],
    "a name with which another ends": [
        LAYERS,
        Rule(match="roberta.encoder.layer.0.output.dense", method="full"),
        Rule(match="classifier.dense", method="full", magnitude=True),
    ],
    "no layer with an update": [Rule(match="classifier", method="full")],
}


@pytest.mark.parametrize("what", NOT_THEIRS)
def test_what_peft_cannot_say_is_written_in_our_own_way(what: str, tmp_path: Path) -> None:
    base = roberta()
    ours = copy.deepcopy(base)
    trimtab.attach(ours, NOT_THEIRS[what])
    stirred(ours)
    trimtab.save_adapter(ours, tmp_path)
    assert not (tmp_path / PEFT_FILES[0]).exists()
    again = copy.deepcopy(base)
    trimtab.load_adapter(again, tmp_path)
    torch.testing.assert_close(run(again), run(ours), rtol=0, atol=0)


@pytest.mark.parametrize("tie", [False, True])
def test_a_resized_vocabulary(tie: bool, tmp_path: Path) -> None:
    """What PEFT stores of it is the base's own where the model was resized alike, and nothing is trained for it; where
    the new rows have other values, they are taken over; without them, the number of rows is named."""
    base = neox(tie_word_embeddings=tie)
    longer = copy.deepcopy(base)
    longer.resize_token_embeddings(57)
    theirs = stirred(get_peft_model(copy.deepcopy(longer), LoraConfig(r=2, target_modules=["dense"])))
    wanted = run(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)

    same = copy.deepcopy(longer)
    report = trimtab.load_adapter(same, tmp_path)
    assert {module.method for module in report.modules} == {"lora"}
    torch.testing.assert_close(run(same), wanted, rtol=0, atol=3e-6)

    torch.manual_seed(9)
    other = copy.deepcopy(base)
    other.resize_token_embeddings(57)
    with torch.no_grad():
        other.get_input_embeddings().weight[50:].normal_()
    report = trimtab.load_adapter(other, tmp_path)
    assert {module.name for module in report.modules if module.method == "full"} >= {"gpt_neox.embed_in"}
    torch.testing.assert_close(run(other), wanted, rtol=0, atol=3e-6)

    before = state_of(base)
    with pytest.raises(AdapterError, match=r"57 tokens, and the model has 50.*resize_token_embeddings\(57\)"):
        trimtab.load_adapter(base, tmp_path)
    assert_unchanged(base, before)


def test_a_module_of_another_shape_is_refused(tmp_path: Path) -> None:
    theirs = get_peft_model(roberta(), LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / PEFT_FILES[1])
    assert any("classifier" in name for name in tensors)
    assert "classifier" in json.loads((tmp_path / PEFT_FILES[0]).read_text())["modules_to_save"]
    model = bert()
    before = state_of(model)
    with pytest.raises(AdapterError, match="made for another model"):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


TOKENS: dict[str, tuple[bool, dict[str, Any]]] = {
    "a list": (False, {"trainable_token_indices": [9, 3, 5]}),
    "a list, tied": (True, {"trainable_token_indices": [9, 3, 5]}),
    "two tables": (False, {"trainable_token_indices": {"embed_in": [4, 3], "lm_head": [20, 6, 7]}}),
    "two tables that are tied": (True, {"trainable_token_indices": {"embed_in": [4, 3], "lm_head": [4, 3]}}),
    "two tied tables with rows of their own": (
        True,
        {"trainable_token_indices": {"embed_in": [4, 3], "lm_head": [20, 6, 7]}},
    ),
}


@pytest.mark.parametrize("what", TOKENS)
def test_trained_tokens(what: str, tmp_path: Path) -> None:
    tie, config = TOKENS[what]
    base = neox(tie_word_embeddings=tie)
    theirs = stirred(get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["dense"], **config)))
    wanted = run(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    trimtab.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(run(ours), wanted, rtol=0, atol=3e-6)

    trimtab.save_adapter(ours, tmp_path / "ours")
    again = copy.deepcopy(base)
    trimtab.load_adapter(again, tmp_path / "ours")
    torch.testing.assert_close(run(again), run(ours), rtol=0, atol=0)
    if what != "two tied tables with rows of their own":
        both = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
        torch.testing.assert_close(run(both), wanted, rtol=0, atol=3e-6)
    trimtab.merge(ours)
    torch.testing.assert_close(run(ours), wanted, rtol=0, atol=3e-6)


def test_rows_of_one_of_two_tied_tables_are_no_affair_of_peft(tmp_path: Path) -> None:
    base = neox(tie_word_embeddings=True)
    ours = copy.deepcopy(base)
    update = Rule(match="*.dense", method="lora", rank=2)
    trimtab.attach(ours, [update, Rule(match="lm_head", method="full", rows=[1, 2])])
    stirred(ours)
    trimtab.save_adapter(ours, tmp_path)
    assert not (tmp_path / PEFT_FILES[0]).exists()
    again = copy.deepcopy(base)
    trimtab.load_adapter(again, tmp_path)
    torch.testing.assert_close(run(again), run(ours), rtol=0, atol=0)
