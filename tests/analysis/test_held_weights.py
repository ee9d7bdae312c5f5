"""Weights that hang on a module are analysed as the weights of layers are: experts that are kept in one tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import trimtab
from contract_cases import stir
from trimtab.analysis.changes import analyse
from trimtab.models.locate import locate


def test_experts(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        num_experts=3,
        num_experts_per_tok=2,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    trimtab.attach(model, trimtab.Rule(match="*.experts", method="dora", rank=2))
    stir(model)
    trimtab.save_adapter(model, tmp_path / "adapter")
    changes = list(analyse(locate(str(tmp_path / "base")), [tmp_path / "adapter"]))
    assert [one.kind for one in changes] == ["gate_up_proj", "down_proj"]
    for one in changes:
        before = dict(model.named_parameters())[one.module].detach().double()
        update = trimtab.effective_weight(model, one.module).double() - before
        assert one.relative == pytest.approx(float(update.norm() / before.norm()), rel=1e-5)
