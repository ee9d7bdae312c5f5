"""A matrix that hangs on a module of the user's: taken where a rule names it, and by nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trimtab
from adapter_tools import assert_unchanged, state_of
from trimtab import PlanError, Rule


class Mix(nn.Module):
    """``x W + b`` with ``W [in, out]``, and a table of positions that is read by its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.positions = nn.Parameter(torch.randn(5, 6))
        self.scale = nn.Parameter(torch.ones(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.positions[: x.shape[-2]]) @ self.weight + self.bias


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mix(), Mix()])
        self.back, self.head = nn.Linear(8, 6), nn.Linear(8, 3)
        self.extra = nn.ParameterList([nn.Parameter(torch.randn(8, 8))])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.back(self.blocks[0](x))) @ self.extra[0])


def disturbed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def effective(model: nn.Module, name: str, method: str) -> Tensor:
    """By the plain formula."""
    holder, _, attribute = name.rpartition(".")
    weight = dict(model.named_parameters(remove_duplicate=False))[name].detach()
    adapter = model.get_submodule(f"{holder}.{attribute}_adapted").adapter
    total = weight + adapter.options.scale * adapter.B @ adapter.A
    return total if method == "lora" else adapter.magnitude[:, None] * total / total.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_matrix_that_is_named_is_adapted_by_the_plain_formula(method: str, tmp_path: Path) -> None:
    base = Model().double()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    model = copy.deepcopy(base)
    report = trimtab.attach(model, Rule(match=["*.weight", "*.positions"], method=method, rank=2, alpha=3))
    names = [f"blocks.{block}.{name}" for block in (0, 1) for name in ("weight", "positions")]
    assert sorted(module.name for module in report.modules) == sorted(names)
    assert torch.allclose(model(x), base(x), rtol=0, atol=1e-12)
    disturbed(model)
    plain = copy.deepcopy(base)
    for name in names:
        plain.get_parameter(name).data.copy_(effective(model, name, method))
    right = plain(x)
    assert torch.allclose(model(x), right, rtol=0, atol=1e-12)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trimtab.trainable_parameters(model).values())

    trimtab.save_adapter(model, tmp_path)
    trimtab.load_adapter(again := copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), model(x))
    trimtab.merge(model)
    assert torch.allclose(model(x), right, rtol=0, atol=1e-12)
    assert model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("match", ["*", "all-linear"])
def test_a_rule_that_names_layers_leaves_it(match: str) -> None:
    report = trimtab.attach(Model(), Rule(match=match, method="lora", rank=2))
    assert {module.name for module in report.modules} == ({"back", "head"} if match == "*" else {"back"})
    head = {} if match == "*" else {"output head": 24}
    assert report.unreached == {"Mix": 2 * (48 + 30), "ParameterList": 64} | head


@pytest.mark.parametrize("match", ["blocks.*", "blocks.0", "blocks.0.*"])
def test_a_rule_that_names_the_module_alone_is_told_of_its_kind(match: str) -> None:
    with pytest.raises(
        PlanError, match=r"ends with no module: (it names \d of kinds .*Mix|nothing has such|.* is a param)"
    ):
        trimtab.attach(Model(), Rule(match=match, method="lora", rank=2))


def test_a_name_nearby_is_suggested() -> None:
    model = Model()
    before = state_of(model)
    with pytest.raises(PlanError, match=r"Near misses: \*\.positions"):
        trimtab.attach(model, Rule(match="*.position", method="lora", rank=2))
    assert_unchanged(model, before)


def test_the_module_is_trained_whole_by_full() -> None:
    model = Model()
    report = trimtab.attach(model, Rule(match="blocks.*", method="full"))
    assert report.trainable_parameters == 2 * (48 + 8 + 30 + 6)
    assert {module.name for module in report.modules} == {"blocks.0", "blocks.1"}
