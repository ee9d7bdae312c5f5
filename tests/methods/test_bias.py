"""``bias: true``: a layer's own bias trained beside its adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from trimtab import PlanError, Rule
from trimtab.surgery.attach import trained_tensors

METHODS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 2},
    {"method": "dora", "rank": 2},
    {"method": "mora", "rank": 1},
    {"method": "lora", "rank": 0, "magnitude": True},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_it_trains_as_the_bare_bias_does(options: dict[str, Any]) -> None:
    """The gradient of the bias at step 0 is the bare layer's, whatever the magnitude; and small steps on a bfloat16
    bias add up, in a copy of its own."""
    torch.manual_seed(3)
    bare = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    model = copy.deepcopy(bare)
    trimtab.attach(model, Rule(match="all-linear", bias=True, **options))
    x = torch.randn(7, 6).double()
    for one in (bare, model):
        one(x).square().sum().backward()
    for place in (0, 2):
        gradient = model[place].adapter.bias.grad
        torch.testing.assert_close(gradient, bare[place].bias.grad, rtol=1e-12, atol=1e-12)
        assert model[place].base.bias.grad is None
    groups = {name: one.group for name, one in trained_tensors(model).items() if name.endswith("adapter.bias")}
    assert list(groups.values()) == ["bias", "bias"]

    half = nn.Sequential(nn.Linear(6, 5).bfloat16())
    with torch.no_grad():
        half[0].bias.fill_(1.0)
    trimtab.attach(half, Rule(match="0", bias=True, **options))
    optimiser = torch.optim.SGD([half[0].adapter.bias], lr=2.0**-7 / 1000)
    for _ in range(1000):
        half[0].adapter.bias.grad = -torch.ones(5)
        optimiser.step()
    assert half(torch.zeros(2, 6).bfloat16()).tolist() == [[1 + 2.0**-7] * 5] * 2
    trimtab.merge(half)
    assert half[0].bias.tolist() == [1 + 2.0**-7] * 5


def test_layers_without_a_bias_stay_without() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    trimtab.attach(model, Rule(match="*", method="lora", rank=1, bias=True))
    assert model[0].adapter.bias is None
    assert model[1].adapter.bias is not None
    alone = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(PlanError, match=r"none of its 1 layers has one. Leave 'bias' out"):
        trimtab.attach(alone, Rule(match="0", method="lora", rank=1, bias=True))


def test_tied_layers_with_one_bias_between_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    trimtab.attach(model, Rule(match="*", method="lora", rank=1, bias=True))
    with torch.no_grad():
        model[0].adapter.bias.fill_(2.0)
    x = torch.zeros(1, 4)
    assert model[0](x).tolist() == [[2.0] * 4]
    assert model[1](x).tolist() == [[0.0] * 4]
    apart = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apart[1].weight = apart[0].weight
    with pytest.raises(PlanError, match="each has a bias of its own"):
        trimtab.attach(apart, Rule(match="*", method="lora", rank=1, bias=True))


def test_a_layer_without_a_bias_gets_one_where_it_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False).bfloat16())
    trimtab.attach(model, Rule(match="0", method="lora", rank=1, bias=True, added_bias=True))
    assert model[0].adapter.bias.tolist() == [0.0] * 3
    with torch.no_grad():
        model[0].adapter.bias.fill_(2.0)
    output = model(torch.zeros(1, 4).bfloat16())
    assert output.dtype == torch.bfloat16
    assert output.tolist() == [[2.0] * 3]


@pytest.mark.parametrize("options", METHODS[:2], ids=str)
def test_a_look_up_adds_the_one_that_it_gets(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(5, 3))
    ids = torch.tensor([[1, 4], [0, 1]])
    start = model(ids)
    trimtab.attach(model, Rule(match="0", bias=True, added_bias=True, **options))
    with torch.no_grad():
        model[0].adapter.bias.fill_(2.0)
    torch.testing.assert_close(model(ids), start + 2)
    model(ids).sum().backward()
    assert model[0].adapter.bias.grad.tolist() == [4.0] * 3
