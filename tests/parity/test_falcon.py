"""Falcon, whose linear layers are of a class of their own, against PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

import trimtab
from contract_cases import stir

TOKENS = torch.arange(20).reshape(2, 10)


def falcon(bias: bool = False) -> FalconForCausalLM:
    torch.manual_seed(4)
    config = FalconConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, bias=bias, multi_query=True
    )
    return FalconForCausalLM(config).double().eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=TOKENS).logits
    return out


@pytest.mark.parametrize("dora", [False, True])
def test_both_ways(dora: bool, tmp_path: Path) -> None:
    model = falcon()
    report = trimtab.attach(model, trimtab.Rule(match="all-linear", method="dora" if dora else "lora", rank=3))
    assert len(report.modules) == 2 * 4
    stir(model)
    trimtab.save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(falcon(), tmp_path / "ours")
    assert torch.allclose(logits(theirs), logits(model), atol=1e-10)

    peft = get_peft_model(falcon(), LoraConfig(r=2, target_modules="all-linear", use_dora=dora)).double()
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft.save_pretrained(tmp_path / "theirs")
    ours = falcon()
    assert len(trimtab.load_adapter(ours, tmp_path / "theirs").modules) == 8
    assert torch.allclose(logits(ours), logits(peft), atol=1e-6)  # PEFT writes float32
    trimtab.merge(ours)
    assert torch.allclose(logits(ours), logits(peft), atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_step_0(bias: bool) -> None:
    model = falcon(bias)
    before = logits(model)
    trimtab.attach(model, trimtab.Rule(match="*.query_key_value", method="lora", rank=2))
    assert torch.allclose(logits(model), before, atol=1e-12)


def test_a_block_that_adds_to_a_layers_output_in_place() -> None:
    """Falcon's blocks do, to the last layer's: the gradient of its magnitude is read off the product instead."""
    grads = []
    for keep in (False, True):
        model = falcon()
        trimtab.attach(model, trimtab.Rule(match="all-linear", method="dora", rank=2, keep_product=keep))
        torch.manual_seed(1)
        stir(model)
        model(input_ids=TOKENS).logits.square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in trimtab.trainable_parameters(model).items()})
    for name, grad in grads[0].items():
        assert grad is not None
        assert torch.allclose(grad, grads[1][name], atol=1e-10), name
