"""Folders that bring a copy of the weight they were trained on (PEFT's, for an output head), and models whose own
weight differs from it: by rounding, or really."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import trimtab

Make = Callable[..., nn.Module]
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def saved_by_peft(model: nn.Module, folder: Path) -> torch.Tensor:
    """Train nothing, but let every trained tensor differ from its start; return PEFT's logits."""
    made = get_peft_model(model, LoraConfig(r=3, lora_alpha=4, target_modules=["lm_head", "k_proj"]))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits: torch.Tensor = made(IDS).logits.float()
    made.save_pretrained(folder, save_embedding_layers=True)
    return logits


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("trained", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("used", ["float32", "bfloat16", "float16"])
def test_a_base_of_another_precision_is_the_same_model(
    trained: str, used: str, tiny_llama: Make, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=30)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    right = saved_by_peft(model.to(getattr(torch, trained)), tmp_path)
    again = tiny_llama(vocab_size=30)
    again.load_state_dict(state)
    trimtab.load_adapter(again.to(getattr(torch, used)), tmp_path)
    logits = again(IDS).logits.float()
    assert (logits - right).norm() / right.norm() < (1e-6 if trained == used == "float32" else 2e-2)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
@pytest.mark.parametrize("used", ["float32", "bfloat16"])
def test_another_weight_is_refused_in_any_precision(trained: str, used: str, tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=30)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved_by_peft(model.to(getattr(torch, trained)), tmp_path)
    state["lm_head.weight"][7, 5] *= 1.02  # five roundings of bfloat16 away, in one place of 480
    again = tiny_llama(vocab_size=30)
    again.load_state_dict(state)
    with pytest.raises(trimtab.AdapterError, match="lm_head: trained on another weight"):
        trimtab.load_adapter(again.to(getattr(torch, used)), tmp_path)
