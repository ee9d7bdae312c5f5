"""Adapters whose modules have other names in the model of today: PEFT's outputs, or a refusal."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

import trimtab
from adapter_tools import PEFT_FILES, assert_unchanged, state_of
from trimtab import AdapterError, methods
from trimtab.adapters.fitting import Places, as_named_in
from trimtab.adapters.record import StoredAdapter

Make = Callable[..., Any]
TEXT = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SIGHT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT |= {"image_size": 16, "patch_size": 8}


def llava() -> nn.Module:
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**SIGHT))
    return tf.LlavaForConditionalGeneration(config).eval()


def paligemma() -> nn.Module:
    config = tf.PaliGemmaConfig(
        text_config=tf.GemmaConfig(**TEXT), vision_config=tf.SiglipVisionConfig(**SIGHT), projection_dim=16
    )
    return tf.PaliGemmaForConditionalGeneration(config).eval()


def qwen() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {name: value for name, value in TEXT.items() if name != "head_dim"} | {"rope_parameters": rope}
    sight = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4}
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=sight)).eval()


def folder_of(place: Path, stem: str, tail: str = "self_attn.q_proj", suffix: str = "") -> Path:
    """A LoRA folder over two blocks, whose tensors begin with ``stem``."""
    tensors = {}
    for layer in range(2):
        name = f"{stem}layers.{layer}.{tail}"
        tensors[f"{name}.lora_A{suffix}.weight"] = torch.randn(2, 16)
        tensors[f"{name}.lora_B{suffix}.weight"] = torch.randn(16, 2)
    save_file(tensors, place / PEFT_FILES[1])
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [tail.split(".")[-1]], "bias": "none"}
    (place / PEFT_FILES[0]).write_text(json.dumps(config))
    return place


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(14).reshape(2, 7)).logits


def peft_on(model: nn.Module, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval())


@pytest.mark.parametrize(
    ("make", "stem"),
    [
        (llava, "language_model.model."),
        (llava, "model.language_model."),
        (paligemma, "language_model.model."),
    ],
)
def test_names_of_older_transformers_mean_what_they_mean_to_peft(
    make: Callable[[], nn.Module], stem: str, tmp_path: Path
) -> None:
    base = make()
    folder = folder_of(tmp_path, f"base_model.model.{stem}")
    right = peft_on(base, folder)
    assert not torch.allclose(right, run(base), atol=1e-3), "PEFT applies it"
    report = trimtab.load_adapter(base, folder)
    assert {module.name for module in report.modules} == {
        f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)
    }
    assert torch.allclose(run(base), right, rtol=0, atol=1e-6)


def test_names_that_transformers_reads_and_peft_leaves_out(tmp_path: Path) -> None:
    """Qwen2-VL of before 4.52: PEFT 0.21 only warns of missing tensors. Held against the same adapter's names of
    today."""
    base = qwen()
    torch.manual_seed(3)
    right = peft_on(base, folder_of(tmp_path, "base_model.model.model.language_model."))
    torch.manual_seed(3)
    trimtab.load_adapter(base, folder_of(tmp_path, "base_model.model.model."))
    assert torch.allclose(run(base), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("stem", "suffix"),
    [
        ("base_model.model._orig_mod.model.", ""),
        ("base_model.model.module.model.", ""),
        ("module.base_model.model.model.", ".default"),
        ("_orig_mod.module.base_model.model._fsdp_wrapped_module.model._fsdp_wrapped_module.", ".legal"),
        ("base_model.model.base_model.model.model.", ""),
        ("base_model.model.model.", ".default"),
    ],
)
def test_what_stood_around_the_model_is_left_out(stem: str, suffix: str, tiny_llama: Make, tmp_path: Path) -> None:
    base = tiny_llama()
    torch.manual_seed(3)
    plain = folder_of(tmp_path, "base_model.model.model.")
    right = peft_on(base, plain)
    torch.manual_seed(3)
    trimtab.load_adapter(base, folder_of(tmp_path, stem, suffix=suffix))
    assert torch.allclose(run(base), right, rtol=0, atol=1e-6)


def test_a_patched_name_still_reads_its_patterns(tiny_llama: Make, tmp_path: Path) -> None:
    """A pattern that begins with ``^`` is over the names without what was around the model."""
    folder = folder_of(tmp_path, "_orig_mod.base_model.model._orig_mod.model.")
    config = json.loads((folder / PEFT_FILES[0]).read_text())
    alphas = {r"^model\.layers\.1\.self_attn\.q_proj": 12}
    (folder / PEFT_FILES[0]).write_text(json.dumps(config | {"alpha_pattern": alphas}))
    model = tiny_llama()
    trimtab.load_adapter(model, folder)
    assert [layer.self_attn.q_proj.adapter.options.alpha for layer in model.model.layers] == [4, 12]


@pytest.mark.parametrize(
    "stem", ["base_model.model.", "base_model.model.language_model.model.", "base_model.model.mdl."]
)
def test_names_that_lead_nowhere_are_refused(stem: str, tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny_llama()
    before = state_of(model)
    with pytest.raises(AdapterError, match="made for another model: 2 of its 2 modules"):
        trimtab.load_adapter(model, folder_of(tmp_path, stem))
    assert_unchanged(model, before)


def test_two_adapters_in_one_folder_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    folder_of(tmp_path, "base_model.model.model.", suffix=".one")
    tensors = {
        f"base_model.model.model.layers.0.self_attn.{name}.weight": torch.zeros(size)
        for name, size in [
            ("q_proj.lora_A.one", (2, 16)),
            ("v_proj.lora_A.two", (2, 16)),
            ("v_proj.lora_B.two", (8, 2)),
        ]
    }
    save_file(tensors, tmp_path / PEFT_FILES[1])
    with pytest.raises(AdapterError, match=r"tensors of 2 adapters \(one, two\) in one folder; save one"):
        trimtab.load_adapter(tiny_llama(), tmp_path)


def test_renamings_that_join_two_modules_are_not_taken(tiny_llama: Make) -> None:
    model = tiny_llama()
    one, other = (StoredAdapter("lora", methods.options_class("lora")(rank=rank), {}) for rank in (1, 2))
    known = {"lm_head": model.lm_head}
    assert as_named_in(model, Places(known), {"module.lm_head": one, "lm_head": other}).keys() == {
        "module.lm_head",
        "lm_head",
    }
    assert as_named_in(model, Places(known), {"module.lm_head": one}) == {"lm_head": one}


def test_a_mapping_that_a_model_brings_along_is_followed(tiny_llama: Make, tmp_path: Path) -> None:
    """Code that comes with a model has it as an attribute of its class, by patterns over names."""
    model = tiny_llama()
    folder = folder_of(tmp_path, "base_model.model.backbone.layers.")
    model._checkpoint_conversion_mapping = {"^head": "lm_head", r"^backbone\.layers\.": "model."}
    right = peft_on(model, folder)
    assert not torch.allclose(right, run(model), atol=1e-3), "PEFT applies it"
    trimtab.load_adapter(model, folder)
    assert torch.allclose(run(model), right, rtol=0, atol=1e-6)
