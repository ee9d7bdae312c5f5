"""The formulas of ``ops/reference.py``, against those of ``plain_formula`` and against autograd; all in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import plain_formula
import trimtab
from trimtab.ops import reference
from trimtab.ops.decomposition import Axis

AXES: list[Axis] = ["output", "input"]
# (out, in, k) of a square: more inputs, more outputs, one chunk, neither side a multiple of k.
SQUARES = [(12, 20, 8), (24, 9, 8), (6, 5, 8), (13, 17, 6), (16, 16, 4)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_equal(got: Tensor, want: Tensor) -> None:
    """To 1e-12 of the largest: sums of some tens of products in float64."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("axis", AXES)
def test_the_effective_weight(axis: Axis) -> None:
    weight, delta = draw(6, 5), draw(6, 5)
    magnitude, _ = trimtab.decompose(weight, axis)
    assert_equal(reference.effective_weight(weight, magnitude=magnitude, axis=axis), weight)
    assert torch.equal(reference.effective_weight(weight, delta, axis=axis), weight + delta)
    turned = reference.effective_weight(weight, delta, magnitude=magnitude, axis=axis)
    assert_equal(turned, plain_formula.effective(weight + delta, magnitude, axis))
    assert_equal(trimtab.decompose(turned, axis)[0], magnitude)


@pytest.mark.parametrize("axis", AXES)
def test_a_row_of_zeros_stays_zero(axis: Axis) -> None:
    weight = draw(6, 5)
    (weight if axis == "output" else weight.t())[2] = 0
    effective = reference.effective_weight(weight, magnitude=torch.ones(6 if axis == "output" else 5), axis=axis)
    assert not (effective if axis == "output" else effective.t())[2].any()
    assert bool(torch.isfinite(effective).all())


def test_the_low_rank_update() -> None:
    a, b = draw(3, 7), draw(5, 3)
    assert_equal(reference.low_rank_delta(a, b, 0.5), plain_formula.low_rank(a, b, {"alpha": 1.5}))


@pytest.mark.parametrize(("out_features", "in_features", "side"), SQUARES)
@pytest.mark.parametrize("turn", [False, True])
def test_the_square_update(turn: bool, out_features: int, in_features: int, side: int) -> None:
    matrix, shape = draw(side, side), (out_features, in_features)
    plain = plain_formula.square_rotation if turn else plain_formula.square_sharing
    assert_equal(reference.square_delta(matrix, shape, turn=turn), plain(matrix, shape))


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("decomposed", [True, False])
def test_the_gradients_are_those_of_autograd(decomposed: bool, axis: Axis, detach: bool) -> None:
    x, total, bias, grad = (
        draw(4, 5).requires_grad_(),
        draw(6, 5).requires_grad_(),
        draw(6).requires_grad_(),
        draw(4, 6),
    )
    magnitude = (1 + draw(6 if axis == "output" else 5).abs()).requires_grad_() if decomposed else None
    effective = plain_formula.effective(total, magnitude, axis, detach)
    y = plain_formula.product(x, effective, bias)
    assert_equal(reference.output(x, effective, bias), y.detach())
    got = reference.gradients(grad, x.detach(), total.detach(), magnitude=magnitude, axis=axis, detach_norm=detach)
    if detach:
        unsaid = reference.gradients(grad, x.detach(), total.detach(), magnitude=magnitude, axis=axis)
        assert_equal(unsaid.total.detach(), got.total.detach())
    leaves = [x, bias, total] + ([] if magnitude is None else [magnitude])
    wanted = torch.autograd.grad(y, leaves, grad)
    for one, want in zip((got.x, got.bias, got.total), wanted, strict=False):
        assert_equal(one.detach(), want)
    if magnitude is None:
        assert got.magnitude is None
    else:
        assert got.magnitude is not None
        assert_equal(got.magnitude.detach(), wanted[3])


def test_the_gradients_of_the_factors() -> None:
    a, b, grad = draw(3, 7).requires_grad_(), draw(5, 3).requires_grad_(), draw(5, 7)
    wanted = torch.autograd.grad(plain_formula.low_rank(a, b, {"alpha": 1.5}), (a, b), grad)
    for got, want in zip(reference.low_rank_gradients(grad, a, b, 0.5), wanted, strict=True):
        assert_equal(got.detach(), want)


@pytest.mark.parametrize(("out_features", "in_features", "side"), SQUARES)
@pytest.mark.parametrize("turn", [False, True])
def test_the_gradient_of_the_square(turn: bool, out_features: int, in_features: int, side: int) -> None:
    matrix, grad = draw(side, side).requires_grad_(), draw(out_features, in_features)
    plain: Any = plain_formula.square_rotation if turn else plain_formula.square_sharing
    (want,) = torch.autograd.grad(plain(matrix, (out_features, in_features)), matrix, grad)
    assert_equal(reference.square_gradient(grad, side, turn=turn), want)


def test_the_norm_is_differentiated_unless_it_is_said_to_be_a_constant() -> None:
    weight, magnitude = draw(4, 3).requires_grad_(), draw(4)
    gradient = draw(4, 3)
    (got,) = torch.autograd.grad(reference.effective_weight(weight, magnitude=magnitude), weight, gradient)
    whole = magnitude[:, None] * weight / weight.square().sum(1, keepdim=True).sqrt()
    (want,) = torch.autograd.grad(whole, weight, gradient)
    assert_equal(got, want)
