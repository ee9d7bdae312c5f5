"""Blocks: which modules are one, and how wide their hidden state is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import trimtab
from trimtab import bases


class Configured(nn.Sequential):
    """A sequence with a configuration."""

    def __init__(self, hidden_size: int | None, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.config = SimpleNamespace(hidden_size=hidden_size)


class Silent(nn.Module):
    """Holds a layer and cannot be called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


KNOWN = {
    "sequence": lambda: nn.Sequential(nn.Linear(4, 3)),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "layer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
}
UNKNOWN = {
    "linear": lambda: nn.Linear(4, 3),
    "conv1d": lambda: Conv1D(4, 3),
    "norm": lambda: nn.LayerNorm(4),
    "activation": nn.ReLU,
    "list": lambda: nn.ModuleList([nn.Linear(4, 3)]),
    "dict": lambda: nn.ModuleDict({"a": nn.Linear(4, 3)}),
    "no forward": Silent,
}


@pytest.mark.parametrize("kind", KNOWN)
def test_what_is_a_block(kind: str) -> None:
    module = KNOWN[kind]()
    handle = bases.find(module, "block")
    assert handle is not None
    assert handle.identity is module
    assert bases.find(module) is None, "and it is no weight"


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_none(kind: str) -> None:
    assert bases.find(UNKNOWN[kind](), "block") is None


def shape(module: nn.Module) -> tuple[int, int]:
    handle = bases.find(module, "block")
    assert handle is not None
    return handle.shape


def test_widths_in_real_models(tiny_llama: Callable[..., nn.Module], tiny_gpt2: Callable[..., nn.Module]) -> None:
    llama, gpt2 = tiny_llama(), tiny_gpt2()
    for model, names in [
        (llama, ["model.layers.0", "model.layers.1.self_attn", "model.layers.1.mlp", "model"]),
        (gpt2, ["transformer.h.0", "transformer.h.1.attn", "transformer.h.1.mlp"]),
    ]:
        for name in names:
            assert shape(model.get_submodule(name)) == (16, 16), name


def test_widths() -> None:
    assert shape(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))) == (5, 6)
    assert shape(nn.Sequential(Conv1D(9, 6), Conv1D(5, 9))) == (5, 6)
    assert shape(nn.Sequential(nn.Sequential(nn.Linear(6, 9)), nn.Linear(9, 5), nn.LayerNorm(5))) == (5, 6)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), "no linear layer that a base knows, and no config"),
        (lambda: Configured(6, nn.Linear(6, 8), nn.Linear(8, 1)), "last linear layer gives 1, and its config.* is 6"),
    ],
)
def test_a_width_that_cannot_be_told_is_asked_for(module: Callable[[], Any], why: str) -> None:
    model = nn.ModuleDict({"a": module()})
    rule: dict[str, Any] = {"match": "a", "method": "serial", "bottleneck": 2}
    before = dict(model.named_modules())
    with pytest.raises(trimtab.PlanError, match=rf"a \(rule 1\): the width .*{why}.*Set 'width' on the rule"):
        trimtab.attach(model, trimtab.Rule(**rule))
    assert dict(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    report = trimtab.attach(model, trimtab.Rule(**rule, width=4))
    assert (report.modules[0].out_features, report.modules[0].in_features) == (4, 4)


def test_dtype_and_device() -> None:
    module = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)).double()
    module[0].weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.uint8), requires_grad=False)
    handle = bases.find(module, "block")
    assert handle is not None
    assert handle.dtype == torch.float64, "that of the first tensor that can hold numbers with a point"
    with torch.device("meta"):
        handle = bases.find(nn.Sequential(nn.Linear(4, 4)), "block")
    assert handle is not None
    assert handle.device.type == "meta"
    empty = bases.find(nn.Sequential(nn.ReLU()), "block")
    assert empty is not None
    assert (empty.dtype, empty.device) == (torch.float32, torch.device("cpu"))


class Anything(nn.Sequential):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


def test_the_input_of_a_call() -> None:
    x = torch.ones(2)
    named, free = bases.find(nn.Sequential(nn.Linear(2, 2)), "block"), bases.find(Anything(nn.Linear(2, 2)), "block")
    assert named is not None
    assert free is not None
    assert named.input((x, 1), {}) is x
    assert named.input((), {"other": 1, "input": x}) is x
    assert named.input((3,), {}) is None
    assert free.input((x,), {}) is x
    assert free.input((), {"hidden_states": x}) is None
