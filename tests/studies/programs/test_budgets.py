"""Plans of equal cost: what is attached trains as many numbers as LoRA does, never more than half a percent over."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab
from budgets import lora_budget, matched_plan
from memory_study import CONTENDERS
from trimtab.errors import PlanError

ADAPTED = [name for name, one in CONTENDERS.items() if one.has_budget]


def llama(blocks: int = 2, width: int = 576) -> LlamaForCausalLM:
    """The shapes of SmolLM2's blocks, without their numbers."""
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, **heads))


@pytest.mark.parametrize("rank", [2, 4, 8, 32, 64])
@pytest.mark.parametrize("name", ADAPTED)
def test_equal_within_one_percent(name: str, rank: int) -> None:
    contender = CONTENDERS[name]
    model = llama()
    budget = rank * 2 * (2 * (576 + 576) + 2 * (192 + 576) + 3 * (1536 + 576))
    assert lora_budget(model, rank) == budget
    report = trimtab.attach(model, matched_plan(model, contender.method, contender.options, rank))
    assert len(report.modules) == 14
    assert 0.99 * budget <= report.trainable_parameters <= 1.005 * budget
    if contender.options.get("magnitude") or contender.method == "dora":
        assert report.trainable_parameters <= budget


def test_dora_pays_its_magnitudes_from_the_rank() -> None:
    model = llama()
    plan = matched_plan(model, "dora", {}, 8)
    assert [rule.options.rank for rule in plan.rules] == [7, 8]
    ranks = Counter(module.rule for module in trimtab.attach(model, plan).modules)
    assert ranks[1] + ranks[2] == 14
    higher = {module.name for module in trimtab_modules(model) if module.rule == 2}
    assert len({name.split(".")[2] for name in higher}) == 2, "raised in both blocks, not in the first alone"


def trimtab_modules(model: LlamaForCausalLM) -> tuple:
    from trimtab.surgery.attach_report import describe

    return describe(model, ()).modules


def test_lora_is_the_measure() -> None:
    plan = matched_plan(llama(), "lora", {}, 192)  # as much as the narrowest matrix has
    assert [rule.describe() for rule in plan.rules] == [
        {"match": "all-linear", "layers": "all", "method": "lora", "rank": 192}
    ]


def test_budgets_that_cannot_be_met() -> None:
    with pytest.raises(PlanError, match=r"a budget of rank 1 \(20,352 parameters\) is too small for dora"):
        matched_plan(llama(), "dora", {}, 1)
    with pytest.raises(PlanError, match="rank 193 is larger than the matrix"):
        matched_plan(llama(), "lora", {}, 193)
