"""A look-up and a head with one weight: one rule for both trains one adapter, whichever of the two comes first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import plain_formula
import trimtab

METHODS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 2},
    {"method": "dora", "rank": 2},
    {"method": "dora", "rank": 0},
    {"method": "dora", "rank": 2, "detach_norm": False},
    {"method": "dora", "rank": 2, "magnitude_axis": "input"},
    {"method": "mora", "rank": 2},
    {"method": "mora", "rank": 2, "form": "sharing", "magnitude": True},
    {"method": "mora", "rank": 2, "magnitude": True, "magnitude_axis": "input"},
]


class Tied(nn.Module):
    """Words that come out of the matrix that they went into."""

    def __init__(self, head_first: bool, entries: int = 11, width: int = 6) -> None:
        super().__init__()
        words, head = nn.Embedding(entries, width), nn.Linear(width, entries)
        head.weight = words.weight
        for name, layer in [("head", head), ("words", words)] if head_first else [("words", words), ("head", head)]:
            self.add_module(name, layer)

    def forward(self, entries: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(entries)))


@pytest.mark.parametrize("entries", [11, 6])
@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_both_act_with_one_effective_weight(
    options: dict[str, Any], head_first: bool, entries: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model: Any = Tied(head_first, entries).double()
    x = torch.randint(entries, (3, 5))
    start = model(x).detach()
    report = trimtab.attach(model, trimtab.Rule(match="*", **options))
    assert [one.name for one in report.modules] == (["head", "words"] if head_first else ["words", "head"])
    assert model.head.adapter is model.words.adapter
    torch.testing.assert_close(model(x), start, rtol=1e-12, atol=1e-12)
    trained = trimtab.trainable_parameters(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.rand_like(parameter))

    tensors = {name: value.detach().requires_grad_() for name, value in model.head.adapter.named_parameters()}
    stored = model.words.base.weight.detach()
    weight = stored if head_first else stored.t()
    total = weight + plain_formula.update(options["method"], options, tensors, weight)
    axis, detach = options.get("magnitude_axis", "output"), options.get("detach_norm", True)
    effective = plain_formula.effective(total, tensors.get("magnitude"), axis, detach)
    effective = effective if head_first else effective.t()  # [entries, width]
    wanted = F.linear(torch.tanh(effective[x]), effective, model.head.base.bias)
    got = model(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(wanted)
    found = torch.autograd.grad(got, list(trained.values()), upstream)
    for one, want in zip(found, torch.autograd.grad(wanted, list(tensors.values()), upstream), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-9, atol=1e-9)

    torch.testing.assert_close(trimtab.effective_weight(model, "head"), effective.detach())
    torch.testing.assert_close(trimtab.effective_weight(model, "words"), effective.detach().t())
    torch.testing.assert_close(model.head.weight, effective)
    torch.testing.assert_close(model.words.weight, effective)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)

    trimtab.save_adapter(model, tmp_path)
    trimtab.detach(model)
    trimtab.load_adapter(model, tmp_path)
    assert torch.equal(model(x), got)
    trimtab.merge(model)
    assert model.head.weight is model.words.weight
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head_first", [False, True])
def test_magnitudes_on_a_trained_weight_are_of_one_direction(head_first: bool) -> None:
    with pytest.raises(trimtab.PlanError, match="in two directions"):
        trimtab.attach(Tied(head_first), trimtab.Rule(match="*", method="full", magnitude=True))


@pytest.mark.parametrize("match", ["*.embed_tokens", "lm_head", ["*.embed_tokens", "lm_head"]])
@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
def test_a_language_model_merges_to_what_it_computed(method: str, match: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(60, (2, 7))
    trimtab.attach(model, trimtab.Rule(match=match, method=method, rank=2))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        right = model(ids).logits
        report = trimtab.merge(model)
        assert bool(report.untied) == isinstance(match, str), "with an adapter on both, the tie stays"
        torch.testing.assert_close(model(ids).logits, right, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, right, rtol=1e-4, atol=1e-5)
