"""When kept norms still hold: equal numbers of one dtype on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from trimtab import methods
from trimtab.methods._norms import marks_of, same_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_tensors_are_the_same(dtype: torch.dtype) -> None:
    tensors = torch.randn(3, 2).to(dtype), nn.Parameter(torch.randn(4).to(dtype)), torch.randn(2, 3).to(dtype).t()
    marks = marks_of(tensors)
    assert same_values(marks, [tensor.clone() for tensor in tensors]) is True
    assert not any(isinstance(mark, torch.Tensor) for mark in marks or ()), "no memory is taken beside the tensors"


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one[1, 1].add_(torch.finfo(one.dtype).eps),
        lambda one: one.neg_(),
        lambda one: one.copy_(one.flip(0)),
        lambda one: one.copy_(one.flip(1)),
        lambda one: one[0, 1].add_(1) + one[1, 0].sub_(1),
    ],
)
def test_whatever_is_written_to_data_makes_other_values(change: Callable[[torch.Tensor], object]) -> None:
    tensor = nn.Parameter(torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, 2.0]]))
    marks, version = marks_of([tensor]), tensor._version
    change(tensor.data)
    assert tensor._version == version
    assert not same_values(marks, [tensor])


def test_a_dtype_or_a_device_makes_another() -> None:
    tensor = torch.ones(4)
    marks = marks_of([tensor])
    assert not same_values(marks, [tensor.double()])
    assert not same_values(marks, [tensor.view(2, 2)])
    assert not same_values(marks, [tensor.to("meta")])
    assert not same_values(marks_of([tensor.to("meta")]), [tensor])


def test_a_tensor_of_another_kind_is_known_by_a_copy() -> None:
    """Such as those of a sharded model, of which numpy sees nothing."""

    class Other(torch.Tensor):
        pass

    tensor = torch.randn(3, 2).as_subclass(Other)
    marks = marks_of([tensor])
    assert isinstance((marks or ())[0], torch.Tensor)
    assert same_values(marks, [tensor.clone()])
    assert not same_values(marks, [tensor.double()])
    tensor[1, 1] += 1
    assert not same_values(marks, [tensor])


def test_a_norm_is_computed_once_for_passes_between_which_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = nn.Sequential(nn.Linear(40, 30))
    trimtab.attach(layer, trimtab.Rule(match="0", method="dora", rank=2))
    adapter, x, computed = layer[0].adapter, torch.randn(50, 40), list[int]()
    squared_norms = type(adapter).squared_norms
    monkeypatch.setattr(
        type(adapter), "squared_norms", lambda *args: computed.append(1) or squared_norms(*args), raising=True
    )

    def passes(context: Callable[[], Any]) -> int:
        before = len(computed)
        with context():
            outputs = [layer(x) for _ in range(3)]
        assert all(torch.equal(one, outputs[0]) for one in outputs)
        return len(computed) - before

    assert passes(torch.no_grad) == 1
    assert passes(torch.inference_mode) == 0
    adapter.B.data.add_(1)
    assert passes(torch.inference_mode) == 1
    with trimtab.for_inference(layer):
        assert passes(torch.inference_mode) == 1, "the caller's promise begins here"
        layer(x).square().sum().backward()  # with a norm of its own: autograd takes none from inference mode
    assert adapter.magnitude.grad.isfinite().all()


def test_methods_are_listed_by_what_they_sit_on() -> None:
    assert set(methods.names("block")) == {"parallel", "serial"}
    assert {"dora", "lora", "mora"} <= set(methods.names("weight"))
