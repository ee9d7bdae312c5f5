"""Every architecture of transformers that keeps experts in one parameter, made tiny by its configuration. In each of
the ways in which it can multiply them its adapters begin as nothing, train, merge, and what is merged is a model like
any.

    pytest --all tests/architectures/test_experts_everywhere.py
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import architecture_checks
import pytest
import torch
from architecture_checks import made, stir
from model_list import architectures
from torch import Tensor, nn

import sampling
import trimtab
from trimtab import bases
from trimtab.methods import _stack
from trimtab.surgery.adapted import bare_modules

NAMES = """
AfmoeForCausalLM AriaTextForCausalLM AXK1ForCausalLM AXK2ForCausalLM BeamForCausalLM Cohere2MoeForCausalLM
DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV4ForCausalLM Dots1ForCausalLM Ernie4_5_MoeForCausalLM
ExaoneMoeForCausalLM FlexOlmoForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM
GptOssForCausalLM GraniteMoeForCausalLM GraniteMoeSWAForCausalLM GraniteMoeHybridForCausalLM
GraniteMoeSharedForCausalLM HunYuanMoEV1ForCausalLM HYV3ForCausalLM HYV4ForCausalLM Inkling2ForCausalLM
InklingForCausalLM JambaForCausalLM JetMoeForCausalLM KimiLinearForCausalLM Kolibri1ForCausalLM LagunaForCausalLM
Llama4ForCausalLM LongcatFlashForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM MiniMaxForCausalLM
MiniMaxM2ForCausalLM MiniMaxM3VLForCausalLM MixtralForCausalLM OlmoeForCausalLM PhimoeForCausalLM Qwen2MoeForCausalLM
Qwen3_5MoeForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM SolarOpenForCausalLM ZayaForCausalLM
AriaForConditionalGeneration DeepseekOcr2ForConditionalGeneration Glm4vMoeForConditionalGeneration
Glm5NextForConditionalGeneration Inkling2ForConditionalGeneration InklingForConditionalGeneration
Llama4ForConditionalGeneration MiniMaxM3SparseForConditionalGeneration MistralLarge4ForConditionalGeneration
Qwen3_5MoeForConditionalGeneration Qwen3OmniMoeThinkerForConditionalGeneration Qwen3VLMoeForConditionalGeneration
UnlimitedOcrForConditionalGeneration OpenAIPrivacyFilterForTokenClassification Glm4vMoeTextModel Glm5NextTextModel
MistralLarge4TextModel MuseSparkTextModel Qwen3VLMoeTextModel
""".split()  # noqa: SIM905
"""Of the auto mappings, without those that have the same experts under another head."""


def experts_of(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in bare_modules(model)
        if isinstance(module, bases.HeldWeight) and (base := bases.find(module)) is not None and base.stack
    ]


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = [(left.float(), right.float()) for left, right in zip(one, other, strict=True) if left.numel()]
    return max(float((left - right).abs().max() / left.abs().max().clamp_min(1e-9)) for left, right in pairs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sampling.sample(NAMES, 13))
def test_experts_begin_as_they_were_train_and_merge(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = _stack.StackPass.read
    monkeypatch.setattr(_stack.StackPass, "read", lambda self: [whole(self), read.append(1)][0])
    made_model, _, inputs = made(name, architectures()[name].model_type)
    model: Any = made_model
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.1)
    bare = architecture_checks._Bare(model, inputs)
    experts = experts_of(model)
    assert experts
    ways = (
        ["eager", "batched_mm", "grouped_mm"] if any(hasattr(one, "is_transposed") for one in model.modules()) else []
    )
    for way in ways or ["eager"]:
        if ways:
            model.set_experts_implementation(way)
        before = bare.run(model)
        trimtab.attach(model, trimtab.Rule(match=experts, method="lora", rank=2))
        assert all(torch.equal(one, other) for one, other in zip(before, bare.run(model), strict=True)), way
        stir(model)
        adapted = bare.run(model)
        assert apart(before, adapted) > 1e-3
        loss = sum((one.float().square().sum() for one in bare._forward(model)), start=torch.zeros(()))
        gradients = torch.autograd.grad(loss, list(trimtab.trainable_parameters(model).values()), allow_unused=True)
        assert all(gradient is not None for gradient in gradients)
        merged = copy.deepcopy(model)
        trimtab.merge(merged)
        assert apart(adapted, bare.run(merged)) < 1e-5, way
        if way == "eager":
            merged.save_pretrained(tmp_path / "merged")
            again = type(model).from_pretrained(tmp_path / "merged").eval()
            if ways:
                again.set_experts_implementation("eager")
            assert apart(adapted, bare.run(again)) < 1e-5
        trimtab.detach(model)
    assert not read, "effective weights of all experts were formed"
