"""Kernels that write over outputs without torch's knowledge, as Liger's do, and the gradients of magnitudes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from trimtab.integrations import liger
from trimtab.integrations.on_import import on_import


def write(tensor: Tensor, values: Tensor) -> None:
    """As a kernel does that has nothing but a pointer."""
    before = tensor._version
    tensor.detach().numpy()[...] = values.numpy()
    assert tensor._version == before


class Gate(torch.autograd.Function):
    """``a * b``, whose backward pass puts the two gradients where a and b were (Liger's swiglu)."""

    module: Any

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return Gate.module.swiglu_backward(a, b, grad)


class Turn(torch.autograd.Function):
    """``q`` turned round where it lies (Liger's rope)."""

    module: Any

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Any:
        return Turn.module.rope_forward(q.transpose(0, 1), k.transpose(0, 1))

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> Any:
        return grad_q.flip(1), grad_k.flip(1)


def swiglu_backward(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_a, grad_b = grad * b, grad * a
    write(a, grad_a)
    write(b, grad_b)
    return a, b


def rope_forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    write(q, q.flip(1).clone())
    write(k, k.flip(1).clone())
    return q, k


def module(name: str, **functions: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(functions)
    liger.teach(made)
    return made


def test_gradients_are_right_where_a_kernel_wrote_over_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Gate, "module", module("liger_kernel.ops.swiglu", swiglu_backward=swiglu_backward), raising=False
    )
    monkeypatch.setattr(Turn, "module", module("liger_kernel.ops.rope", rope_forward=rope_forward), raising=False)
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(6, 8, bias=False) for _ in range(4))
    trimtab.attach(model, trimtab.Rule(match="*", method="dora", rank=2))
    x = torch.randn(5, 6)

    def gradients(by_kernels: bool) -> list[Tensor]:
        gate, up, query, key = (layer(x) for layer in model)
        if by_kernels:
            gated, (query, key) = Gate.apply(gate, up), Turn.apply(query, key)
        else:
            gated, query, key = gate * up, query.flip(1), key.flip(1)
        loss = (gated + query.sin() * key.cos()).square().sum()
        return [*torch.autograd.grad(loss, list(trimtab.trainable_parameters(model).values()))]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_library_is_taught_once_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taught_later.py").write_text("told = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        on_import("taught_later", lambda module: module.told.append(1))
    assert "taught_later" not in sys.modules
    assert importlib.import_module("taught_later").told == [1]
    assert "taught_later" not in {getattr(finder, "name", "") for finder in sys.meta_path}
    monkeypatch.delitem(sys.modules, "taught_later")


def test_functions_that_write_are_those_of_the_release_that_is_tested() -> None:
    """Named in Liger's own files, which cannot be imported where triton finds no GPU."""
    package = importlib.util.find_spec("liger_kernel")
    assert package is not None
    assert package.submodule_search_locations
    for name, (function, _) in liger.WRITERS.items():
        source = Path(package.submodule_search_locations[0], *name.split(".")[1:]).with_suffix(".py").read_text()
        assert f"def {function}(" in source
