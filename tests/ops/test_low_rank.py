"""The norm of ``W + s B A`` by its three terms, against the sum built in full in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.ops import decomposition
from trimtab.ops.cost import PROCESSOR, full_digits_for_few
from trimtab.ops.kernels import kernels_for
from trimtab.ops.linear_map import MATRIX
from trimtab.ops.low_rank import LowRank, squared_norms

AXES: list[decomposition.Axis] = ["output", "input"]


def draw(dtype: torch.dtype, rank: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    weight = (torch.randn(40, 60) / 8).to(dtype)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    return weight, torch.randn(rank, 60).to(full) / 8, torch.randn(40, rank).to(full)


def dense(weight: Tensor, a: Tensor, b: Tensor, scale: float, axis: str) -> Tensor:
    total = weight.double() + scale * b.double() @ a.double()
    return total.square().sum(1 if axis == "output" else 0)


def squares_of(weight: Tensor, axis: decomposition.Axis, dtype: torch.dtype) -> Tensor:
    return decomposition.squared_norms(weight, axis).to(dtype)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("scale", [0.01, 0.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_three_terms_equal_the_dense_norm(axis: decomposition.Axis, scale: float, dtype: torch.dtype) -> None:
    """To a few roundings of the dtype that multiplies with W; in half precision only the middle term feels them."""
    weight, a, b = draw(dtype)
    got = squared_norms(weight, squares_of(weight, axis, a.dtype), a, b, scale=scale, axis=axis)
    want = dense(weight, a, b, scale, axis)
    assert got.dtype == a.dtype
    assert bool(((got.double() - want).abs() <= 4 * torch.finfo(dtype).eps * want).all())


@pytest.mark.parametrize("axis", AXES)
def test_gradients(axis: decomposition.Axis) -> None:
    weight, a, b = draw(torch.float64)
    squares = squares_of(weight, axis, torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: squared_norms(weight, squares, a, b, scale=0.7, axis=axis), (a, b))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_cancels_a_row_never_gives_a_negative_square(
    axis: decomposition.Axis, dtype: torch.dtype
) -> None:
    """``W = u v^T`` and ``s B A = - u v^T``: every norm is 0, and what is left is rounding: at most a few units of
    the square that was cancelled."""
    a, b = torch.randn(1, 60), torch.randn(40, 1)
    a, b = a.to(dtype).float(), b.to(dtype).float()
    weight = (b @ a).to(dtype)
    squares = squares_of(weight, axis, torch.float32)
    got = squared_norms(weight, squares, a, -b, scale=1.0, axis=axis)
    assert bool((got >= 0).all())
    assert bool((got <= 8 * torch.finfo(dtype).eps * squares).all())


@pytest.mark.parametrize("axis", AXES)
def test_an_update_of_zero_leaves_the_squares_bit_for_bit(axis: decomposition.Axis) -> None:
    weight, a, b = draw(torch.bfloat16)
    squares = squares_of(weight, axis, torch.float32)
    assert torch.equal(squared_norms(weight, squares, a, torch.zeros_like(b), scale=2.0, axis=axis), squares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_tokens_in_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    """A few tokens are multiplied with the update in float32, so only the sum is rounded."""
    _, a, b = draw(dtype)
    x, product = (torch.randn(PROCESSOR.few[dtype.itemsize], width).to(dtype) for width in (60, 40))
    want = product.double() + 0.7 * x.double() @ a.double().t() @ b.double().t()
    thin = LowRank(0.7).thin(x, (a, b), MATRIX, full_digits_for_few(len(x), dtype, "cpu"))
    kernels_for(x).forward(product, thin=thin, ratio=None, bias=None, in_place=True)
    assert bool(((product.double() - want).abs() <= 0.51 * torch.finfo(dtype).eps * want.abs() + 1e-5).all())


@pytest.mark.parametrize("axis", AXES)
@torch.no_grad()
def test_a_stack_is_measured_weight_by_weight(axis: decomposition.Axis) -> None:
    each = [draw(torch.float64) for _ in range(3)]
    weight, a, b = (torch.stack(parts) for parts in zip(*each, strict=True))
    squares = torch.stack([squares_of(one, axis, torch.float64) for one in weight])
    want = torch.stack([dense(*one, 0.5, axis) for one in each])
    torch.testing.assert_close(squared_norms(weight, squares, a, b, scale=0.5, axis=axis), want)
