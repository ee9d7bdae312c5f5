"""Look-ups and convolutions where they stand: every layer of a model that a base knows, in architectures of
transformers made tiny by their configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import trimtab
from sampling import sample
from trimtab.surgery.adapted import Adapted

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def build(kind: str, config: str, **settings: Any) -> Callable[[], Any]:
    def made() -> Any:
        return getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()

    return made


def image(side: int = 32, channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, channels, side, side)}


def ids(vocabulary: int = 40) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, vocabulary, (2, 7))}


SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
}
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "ResNet": (
        build(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 12],
            depths=[1, 1],
            layer_type="basic",
        ),
        image,
    ),
    "ConvNeXt": (
        build("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 12], depths=[1, 1], num_stages=2),
        image,
    ),
    "ViT": (
        build(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            image_size=16,
            patch_size=4,
        ),
        lambda: image(16),
    ),
    "Whisper": (
        build(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=12,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=2,
        ),
        lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(4, 40, (2, 5))},
    ),
    "Wav2Vec2": (
        build(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            vocab_size=12,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            conv_dim=(8, 8),
            conv_kernel=(4, 3),
            conv_stride=(3, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        lambda: {"input_values": torch.randn(2, 120)},
    ),
    "VideoMAE": (
        build(
            "VideoMAEForVideoClassification",
            "VideoMAEConfig",
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            image_size=8,
            patch_size=4,
            num_frames=4,
            tubelet_size=2,
        ),
        lambda: {"pixel_values": torch.randn(2, 4, 3, 8, 8)},
    ),
    "Bart": (build("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ, scale_embedding=True), ids),
    "Gemma3": (
        build("Gemma3ForCausalLM", "Gemma3TextConfig", **TEXT, intermediate_size=20, head_dim=8, num_key_value_heads=1),
        ids,
    ),
    "Bert": (build("BertForMaskedLM", "BertConfig", **TEXT, intermediate_size=20), ids),
    "GPT2": (build("GPT2LMHeadModel", "GPT2Config", vocab_size=40, n_embd=16, n_layer=1, n_head=2), ids),
}
# Layers whose weight is computed before it is used, or that look at something else than entries: passed over by "*".
PASSED_OVER = {
    "Wav2Vec2": {"wav2vec2.encoder.pos_conv_embed.conv"},
    "Bart": {"model.encoder.embed_positions", "model.decoder.embed_positions"},
    "Whisper": {"model.decoder.embed_positions"},
}
METHODS = [{"method": method, "rank": 2} for method in ("lora", "dora", "mora")]
CASES = [(name, options) for name in MODELS for options in METHODS]


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**inputs).logits
    return output


@pytest.mark.parametrize(("name", "options"), sample(CASES, 2), ids=str)
def test_every_layer_of_a_model(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    bare = copy.deepcopy(model)
    start = answer(model, x)
    start.square().sum().backward()
    reached = {place for place, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    report = trimtab.attach(model, trimtab.Rule(match="*", **options))
    names = {one for module in report.modules for one in (module.name, *module.aliases)}
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    there = {place for place, module in bare.named_modules() if isinstance(module, kinds)}
    assert there - names == PASSED_OVER.get(name, set())
    torch.testing.assert_close(answer(model, x), start, rtol=1e-4, atol=1e-4 * float(start.detach().abs().max()))

    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    answer(model, x).square().sum().backward()
    for place, parameter in trimtab.trainable_parameters(model).items():
        module, _, _ = place.rpartition(".adapter.")
        if f"{module}.weight" in reached:
            assert parameter.grad is not None, place
            assert bool(parameter.grad.any()), place

    with torch.no_grad():
        right = answer(model, x)
        trimtab.save_adapter(model, tmp_path / "adapter")
        trimtab.load_adapter(bare, tmp_path / "adapter")
        assert torch.equal(answer(bare, x), right)
        trimtab.merge(model)
        room = 1e-4 * float(right.abs().max())
        torch.testing.assert_close(answer(model, x), right, rtol=1e-4, atol=room)
        model.save_pretrained(tmp_path / "merged")
        again = type(model).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(answer(again, x), right, rtol=1e-4, atol=room)


def test_a_parametrised_convolution_is_named_with_the_reason() -> None:
    make, _ = MODELS["Wav2Vec2"]
    with pytest.raises(trimtab.PlanError, match=r"no base knows \(Parametrized.*pos_conv_embed"):
        trimtab.attach(make(), trimtab.Rule(match="*.pos_conv_embed.conv", method="lora", rank=2))


@pytest.mark.parametrize("name", ["ConvNeXt", "Whisper", "Gemma3"])
def test_all_linear_takes_no_look_up_and_no_convolution(name: str) -> None:
    model = MODELS[name][0]()
    trimtab.attach(model, trimtab.Rule(match="all-linear", method="lora", rank=1))
    adapted = [module.base for module in model.modules() if isinstance(module, Adapted)]
    assert adapted
    assert {type(layer) for layer in adapted} == {nn.Linear}
