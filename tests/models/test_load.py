"""Hugging Face model folders: read, and refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from trimtab.errors import ModelError
from trimtab.models.heads import head_for
from trimtab.models.load import empty_model, load_model
from trimtab.models.locate import Source, locate
from trimtab.models.model_files import ModelFiles, load_config_only, load_tokenizer, loading

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special.values(), *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tiny_model(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": 260, "tie_word_embeddings": True} | changes))).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder as transformers itself writes it."""
    path = tmp_path / "tiny"
    tiny_model().save_pretrained(path)
    tiny_tokenizer(eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def source_of(path: Path) -> Source:
    return locate(str(path))


def test_a_model_is_loaded_in_the_asked_type(folder: Path) -> None:
    reference = tiny_model()
    ids = torch.tensor([[1, 2, 3, 4]])
    model = load_model(source_of(folder))
    assert not model.training
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert {p.dtype for p in load_model(source_of(folder), torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_asked_attention_is_used(folder: Path, attention: str) -> None:
    assert load_model(source_of(folder), attention=attention).config._attn_implementation == attention


def test_loading_is_silent_and_leaves_transformers_as_it_was(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(source_of(folder))
    load_tokenizer(source_of(folder))
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_the_configuration_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert load_config_only(source_of(folder)).hidden_size == 16


def test_files_are_read_once_and_a_head_changes_nothing_of_what_they_say(folder: Path) -> None:
    files = ModelFiles(source_of(folder))
    said, reader = files.config.to_dict(), files.reader
    head = head_for("AutoModelForSequenceClassification", ["calm", "windy", "stormy"])
    headed = files.read_for(head)
    assert empty_model(headed).config.id2label == {0: "calm", 1: "windy", 2: "stormy"}
    assert headed.reader is reader
    assert headed.config is files.config
    assert files.config.to_dict() == said
    assert files.source.head.problem == ""


def test_an_empty_model_has_the_shapes_and_no_memory(tmp_path: Path) -> None:
    # Llama 3 8B: only a configuration, and more parameters than the test may hold.
    big: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    config = LlamaConfig(**big, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    model = empty_model(source_of(tmp_path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248  # as published
    assert model.get_submodule("model.layers.31.mlp.down_proj").weight.shape == (4096, 14336)


def test_an_empty_model_ties_what_the_model_ties(folder: Path) -> None:
    model = empty_model(source_of(folder))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_tokenizer_pads_on_the_right(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    tokenizer = load_tokenizer(source_of(folder))
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token": "<pad>", "eos_token": "<end>"}, "<pad>"),
        ({"eos_token": "<end>"}, "<end>"),
        ({"unk_token": "<unk>"}, "<unk>"),
    ],
)
def test_what_a_tokenizer_pads_with(tmp_path: Path, special: dict[str, str], expected: str) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    tiny_tokenizer(**special).save_pretrained(tmp_path)
    assert load_tokenizer(source_of(tmp_path)).pad_token == expected


# Refusals in reading


def test_a_tokenizer_without_anything_to_pad_with(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no pad, eos or unk token.*tokenizer_config\.json"):
        load_tokenizer(source_of(tmp_path))


def test_no_tokenizer(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no tokenizer: expected one of tokenizer\.json"):
        load_tokenizer(source_of(tmp_path))


def test_no_weights(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"expected \*\.safetensors beside config\.json"):
        load_model(source_of(tmp_path))


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a file was unpickled",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_never_opened(tmp_path: Path, name: str) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(ModelError, match=rf"pickled \({name}\).*convert it once"):
        load_model(source_of(tmp_path))


def test_pickled_weights_beside_safetensors_of_another_name_are_not_fallen_back_to(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")  # harmless and complete: transformers would take it
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_model(source_of(folder))


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights of a LlamaForCausalLM.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(source_of(folder))


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(ModelError, match="tiny"):
        load_model(source_of(folder))


def test_a_truncated_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_model(source_of(folder))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ('{"model_type": "no-such-model"}', "no-such-model"),
        ("{}", "model_type"),
        (
            '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}',
            "model.trust_remote_code=true",
        ),
    ],
)
def test_configurations_that_cannot_be_read(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "own.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match=word):
        load_config_only(source_of(tmp_path))


def test_a_model_that_is_not_a_causal_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="no AutoModelForCausalLM of the kind ViT"):
        empty_model(source_of(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("load", "told"),
    [
        *((load, "from HuggingFaceTB/no-such-model.*connect.*") for load in (load_tokenizer, load_model)),
        # Said without asking transformers, which would try to reach the hub for as long again.
        *(
            (load, r"HuggingFaceTB/no-such-model has not been fetched before\.")
            for load in (load_config_only, empty_model)
        ),
    ],
)
def test_a_hub_that_is_out_of_reach(load: Callable[[Source], object], told: str) -> None:
    source = Source("smollm2-135m", "hub", "HuggingFaceTB/no-such-model", advice="Do: pip install x")
    with pytest.raises(ModelError, match=rf"smollm2-135m: .*{told} Do: pip install x"):
        load(source)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there is not enough memory; close other programs"),
        (RuntimeError("unable to open file <a>: Too many open files (24)"), "raise the limit"),
    ],
)
def test_what_the_machine_refuses_is_said_with_what_helps(error: Exception, said: str) -> None:
    with (
        pytest.raises(ModelError, match=rf"here: the model cannot be loaded\. .*{said}"),
        loading(Source("here", "folder", "here"), "model"),
    ):
        raise error
