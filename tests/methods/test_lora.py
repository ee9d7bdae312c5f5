"""LoRA and DoRA: scale, start, sizes. Their outputs and gradients are in the contract suite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import trimtab
from trimtab import bases, methods
from trimtab.methods import Method


def make(method: str, out_features: int, in_features: int, layer: nn.Module | None = None, **options: object) -> Method:
    handle = bases.find(layer or nn.Linear(in_features, out_features))
    assert handle is not None
    return methods.method_class(method)(handle, methods.options_class(method)(**options))


def sizes(adapter: Method) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in adapter.named_parameters()}


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 8, "alpha": 16}, 2.0),
        ({"rank": 8, "alpha": 1}, 0.125),
        ({"rank": 8}, 2.0),  # alpha is twice the rank unless said
        ({"rank": 16, "alpha": 8, "rank_stabilised": True}, 2.0),
        ({"rank": 4, "rank_stabilised": True}, 4.0),
    ],
    ids=str,
)
def test_scale(options: dict[str, object], scale: float) -> None:
    adapter = make("lora", 20, 20, **options)
    delta = adapter.delta(torch.float32)
    assert isinstance(delta, Tensor)
    assert not delta.any(), "B starts at zero"
    with torch.no_grad():
        adapter.A.zero_()
        adapter.A[0, 0] = 1
        adapter.B[0, 0] = 1
    moved = adapter.delta(torch.float32)
    assert isinstance(moved, Tensor)
    assert moved[0, 0].item() == pytest.approx(scale, rel=1e-6)
    assert moved.count_nonzero() == 1


@pytest.mark.parametrize(
    ("options", "bound", "deviation"),
    [
        ({}, 1 / math.sqrt(400), 1 / math.sqrt(3 * 400)),  # uniform between -1/sqrt(in) and 1/sqrt(in)
        ({"init": "gaussian"}, None, 1 / 32),
        ({"init": "gaussian", "init_std": 1.0}, None, 1.0),
    ],
    ids=str,
)
def test_how_a_is_drawn(options: dict[str, object], bound: float | None, deviation: float) -> None:
    """12,800 draws: the deviation is off by more than 3 % once in ten thousand times."""
    adapter = make("lora", 64, 400, rank=32, **options)
    assert adapter.A.shape == (32, 400)
    assert adapter.A.std().item() == pytest.approx(deviation, rel=0.03)
    assert abs(adapter.A.mean().item()) < 0.04 * deviation
    if bound is not None:
        assert 0.98 * bound < adapter.A.abs().max().item() <= bound
    assert not adapter.B.any()


def test_sizes() -> None:
    assert sizes(make("lora", 6, 10, rank=3)) == {"A": [3, 10], "B": [6, 3]}
    assert sizes(make("dora", 6, 10, rank=3)) == {"magnitude": [6], "A": [3, 10], "B": [6, 3]}
    assert sizes(make("dora", 6, 10, rank=3, magnitude_axis="input")) == {"magnitude": [10], "A": [3, 10], "B": [6, 3]}
    assert sizes(make("lora", 6, 10, rank=0, magnitude=True)) == {"magnitude": [6]}
    assert sizes(make("dora", 6, 10, rank=0)) == {"magnitude": [6]}
    with torch.device("meta"):
        count = sum(p.numel() for p in make("lora", 4096, 4096, nn.Linear(4096, 4096), rank=8).parameters())
    assert count == 65_536


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.float32, "float64", torch.float64),
    ],
)
def test_dtype_of_the_trained_tensors(base: torch.dtype, asked: str | None, expected: torch.dtype) -> None:
    for method in methods.names():
        adapter = make(method, 16, 16, nn.Linear(16, 16).to(base), dtype=asked)
        assert {parameter.dtype for parameter in adapter.parameters()} == {expected}


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_start_at_the_norms(axis: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(50, 30).to(dtype)
    adapter = make("dora", 30, 50, layer, rank=2, magnitude_axis=axis)
    norms = layer.weight.double().norm(dim=1 if axis == "output" else 0)
    assert adapter.magnitude is not None
    # The root of the rounded square: one unit at most, and step 0 divides it by the very same root.
    error = (adapter.magnitude.double() - norms).abs()
    assert bool((error <= torch.finfo(torch.float32).eps * norms).all())
    with torch.no_grad():
        ratio = adapter.ratio(layer.weight, bases.find(layer))
    assert ratio is not None
    assert bool((ratio == 1).all())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_rank_larger_than_the_matrix(method: str) -> None:
    trimtab.attach(nn.Sequential(nn.Linear(10, 6)), trimtab.Rule(match="0", method=method, rank=6))
    with pytest.raises(trimtab.PlanError, match=r"rank 7 .* 6 x 10 has rank at most 6"):
        trimtab.attach(nn.Sequential(nn.Linear(10, 6)), trimtab.Rule(match="0", method=method, rank=7))


def test_norms_are_not_stored() -> None:
    """They follow from the base, which is there wherever the adapter is."""
    assert set(make("dora", 6, 10, rank=2).state_dict()) == {"A", "B", "magnitude"}


def test_a_layer_with_more_inputs_and_outputs_keeps_what_was_learned_and_nothing_is_learned_of_the_new() -> None:
    adapter = make("lora", 6, 10, rank=3)
    with torch.no_grad():
        adapter.B.normal_()
    before = adapter.delta(torch.float32)
    adapter.refit(bases.find(nn.Linear(14, 9)), None)
    after = adapter.delta(torch.float32)
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    # Products of other shapes may be rounded otherwise.
    torch.testing.assert_close(after, nn.functional.pad(before, (0, 4, 0, 3)), rtol=1e-6, atol=1e-6)
    assert not after[6:].any()
    assert not after[:, 10:].any()


def test_an_adapter_is_moved_as_any_module_is() -> None:
    adapter = make("dora", 6, 10, rank=3)
    assert adapter.double() is adapter
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float64}


@pytest.mark.parametrize(("layer", "second"), [(nn.Linear(4, 5), "B"), (nn.Embedding(5, 4), "A")])
def test_the_factor_that_starts_at_zero_has_the_rate_of_the_second(layer: nn.Module, second: str) -> None:
    adapter = make("lora", 5, 4, layer, rank=2)
    assert [name for name, group in adapter.rate_groups.items() if group == "second factor"] == [second]
    assert not getattr(adapter, second).any()
