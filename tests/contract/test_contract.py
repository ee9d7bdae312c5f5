"""Every method on every base: what it computes, against the plain formula in float64.

Tolerances are in units of the base's dtype, times the largest expected element. In half precision the products are
summed in float32, and what is left are single roundings of the factors, of the product and of what is added to it: 2
units for outputs, 3 for gradients, which pass through two products. In float32 and float64 the additions round as
well, a little each: 4 units and 6. In float64 such a tolerance lets no wrong term hide.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

import trimtab
from contract_cases import (
    ALWAYS_BIASED,
    APART,
    BUILDERS,
    DTYPES,
    HELD,
    QUANTISED,
    Case,
    Holder,
    Reference,
    allowed,
    assert_close,
    cases,
    factors,
    plain,
    quantise,
    stir,
)
from pairwise import pairs
from trimtab import bases, methods
from trimtab.bases import Kind

ALL = cases(DTYPES)
# Storing and restoring does not depend on the digits: one full and one half dtype.
TWO_DTYPES = cases(DTYPES[:2])
WEIGHTS = [case for case in ALL if case.sits_on == "weight"]
BLOCKS = cases([torch.float32], on=["block"])


def test_every_base_can_be_built() -> None:
    assert set(BUILDERS) | HELD == set(bases.names()), "a new kind of base needs a line in tests/contract_cases.py"
    assert set(BUILDERS) >= ALWAYS_BIASED
    assert {case.method for case in ALL} == set(methods.names())
    for name, build in BUILDERS.items():
        layer = build(3, 5, True)
        kind = next(kind for kind in get_args(Kind) if name in bases.names(kind))
        handle = bases.find(quantise(layer, name) if name in QUANTISED else layer, kind)
        assert handle is not None
        assert type(handle).__module__ == f"trimtab.bases.{name}"
        assert handle.shape == (3, 5)


@pytest.mark.parametrize("method", methods.names())
def test_every_two_values_stand_together_once(method: str) -> None:
    """All options but those tested apart, all bases, dtypes and shapes, and every pair of their values."""
    varied = factors(method)
    assert set(methods.options_class(method).model_fields) - APART <= varied.keys()
    assert varied["base"] == [name for name in bases.names(methods.method_class(method).sits_on) if name not in HELD]
    defaults = {name: field.default for name, field in methods.options_class(method).model_fields.items()}
    seen = set()
    for case in ALL:
        if case.method == method:
            place = {"base": case.base, "biased": case.bias, "base_dtype": case.dtype, "shape": case.shape}
            row = {**defaults, **case.said, **place}
            seen |= {((one, row[one]), (other, row[other])) for one, other in combinations(varied, 2)}
    for (one, first), (other, second) in pairs(varied, partial(allowed, method)):
        assert ((one, varied[one][first]), (other, varied[other][second])) in seen


@pytest.mark.parametrize("case", ALL, ids=str)
def test_step_zero_is_the_identity(case: Case) -> None:
    bare = case.bare()
    x = case.input()
    expected = bare(x)
    model = case.fresh()
    for mode in (True, False):  # in training too: dropout on a zero update changes nothing
        got = model.train(mode)(x)
        assert got.dtype == expected.dtype
        if case.magnitude:
            # The ratio is 1 to float32's rounding; in half precision the bias is added in a rounding of its own.
            assert_close(got, expected, 2 * case.eps, "output at step 0")
        else:
            assert torch.equal(got, expected), "without a magnitude, step 0 is exact"


@pytest.mark.parametrize("case", ALL, ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    model = case.trained()
    plain = Reference(model.adapted, case)
    gradient_tolerance = (3 if case.half else 6) * case.eps
    x = case.input().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    output, expected = model(x), plain(x64)
    assert output.dtype == case.dtype
    assert_close(output, expected, (2 if case.half else 4) * case.eps, "output")

    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream.double())
    assert x.grad is not None
    assert x64.grad is not None
    assert_close(x.grad, x64.grad, gradient_tolerance, "gradient of the input")
    trained = dict(model.adapted.adapter.named_parameters())
    assert trained.keys() == plain.tensors.keys()
    for name, parameter in trained.items():
        expected_grad = plain.tensors[name].grad
        assert parameter.grad is not None, name
        assert expected_grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert_close(parameter.grad, expected_grad, gradient_tolerance, f"gradient of {name}")

    for name, parameter in model.adapted.base.named_parameters():
        assert parameter.grad is None, f"the base's {name} must not get a gradient"
        assert not parameter.requires_grad
    assert set(trimtab.trainable_parameters(model)) == {f"layer.adapter.{name}" for name in trained}


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_effective_weight_and_merge(case: Case) -> None:
    model = case.trained().eval()
    x = case.input()
    exact = Reference(model.adapted, case).effective().detach()
    before = model(x)
    bias = model.adapted.bias
    expected = exact.new_zeros(len(x), case.shape[0]) if bias is None else bias.double().expand(len(x), -1)
    expected = expected + x.double() @ exact.t()

    weight = trimtab.effective_weight(model, "layer")
    full = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert weight.dtype == full
    assert_close(weight, exact, 2 * torch.finfo(full).eps, "effective weight")
    assert_close(before, expected, (2 if case.half else 4) * case.eps, "forward against the effective weight")

    report = trimtab.merge(model)
    assert report.modules == ("layer",)
    handle = bases.find(model.layer)
    assert handle is not None, "after the merge the layer is an ordinary one again"
    # Rounded once: every element lies within half a unit of the exact one (float16 has a smallest step as well).
    # The float64 arithmetic itself is good to a few of its own units; what a quantised base dequantises is a product of
    # float32 numbers, one of them a quotient or a sum.
    half_unit = case.eps / 2 * exact.abs() + torch.finfo(case.dtype).smallest_normal * case.eps
    arithmetic = (3 * torch.finfo(torch.float32).eps if case.base in QUANTISED else 8e-16) * exact.abs().max()
    assert bool(((handle.weight().double() - exact).abs() <= half_unit + arithmetic).all())
    assert report.rounding <= case.eps
    assert_close(model(x), before, (2 if case.half else 4) * case.eps, "merged output against the adapted one")


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_a_block_has_no_weight_to_merge_into(case: Case) -> None:
    model = case.trained().eval()
    x = case.input()
    before = model(x)
    with pytest.raises(trimtab.SurgeryError, match=r"layer \(method .*no weight to fold .*keep the adapter beside"):
        trimtab.merge(model)
    with pytest.raises(trimtab.SurgeryError, match="'layer' is a block with an adapter"):
        trimtab.effective_weight(model, "layer")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("case", TWO_DTYPES, ids=str)
def test_detach_gives_the_base_back(case: Case) -> None:
    model = case.bare()
    weight, *bias = model.layer.parameters()
    if case.base not in QUANTISED:
        weight.requires_grad_(True)
    if case.bias:
        bias[0].requires_grad_(False)
    layer, before = model.layer, {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trimtab.attach(model, trimtab.Rule(match="layer", method=case.method, **case.said))
    train_a_step(model, case.input())

    assert trimtab.detach(model) == 1
    assert model.layer is layer
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(plain(after[name]), plain(value)), name
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize("case", TWO_DTYPES, ids=str)
def test_save_and_load_are_bit_equal(case: Case, tmp_path: Path) -> None:
    model = case.trained().eval()
    trimtab.save_adapter(model, tmp_path)
    other = case.bare()
    trimtab.load_adapter(other, tmp_path)
    other.eval()
    saved, loaded = dict(model.adapted.adapter.named_parameters()), dict(other.adapted.adapter.named_parameters())
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name
    assert other.adapted.method == case.method
    assert other.adapted.adapter.options == model.adapted.adapter.options
    x = case.input()
    assert torch.equal(model(x), other(x))


def train_a_step(model: Holder, x: Tensor) -> None:
    optimiser = torch.optim.AdamW(trimtab.trainable_parameters(model).values(), lr=1e-2)
    model.train()
    model(x).float().square().sum().backward()
    optimiser.step()
    optimiser.zero_grad()
    stir(model, 0.01)
