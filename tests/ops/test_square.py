"""MoRA's fixed maps: each against its meaning, and against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch

import plain_formula
from trimtab.ops import reference
from trimtab.ops.cost import PROCESSOR
from trimtab.ops.kernels.contract import BackwardPass
from trimtab.ops.linear_map import MATRIX
from trimtab.ops.square import Square

# (out, in, k): fewer, as many and more chunks than blocks; k dividing both, one or neither side; k above either side.
SIZES = [(8, 24, 4), (8, 8, 4), (24, 8, 4), (7, 19, 4), (19, 7, 4), (10, 13, 6), (3, 13, 6), (13, 3, 6), (5, 5, 2)]


def squares() -> list[Square]:
    return [Square(i, o, k, turn) for o, i, k in SIZES for turn in (False, True)]


@pytest.mark.parametrize("square", squares(), ids=str)
def test_delta_equals_the_plain_formula(square: Square) -> None:
    matrix = torch.randn(square.side, square.side, dtype=torch.float64)
    shape = (square.out_features, square.in_features)
    formula = plain_formula.square_rotation if square.turn else plain_formula.square_sharing
    want = formula(matrix, shape)
    assert torch.allclose(square.delta((matrix,)), want, rtol=1e-13, atol=1e-13)
    for tokens in (1, square.side):  # few tokens are turned themselves, for many M is
        product = torch.zeros(tokens, square.out_features, dtype=torch.float64)
        x = torch.randn(tokens, square.in_features, dtype=torch.float64)
        square.add_product(product, x, (matrix,), MATRIX)
        assert torch.allclose(product, x @ want.t(), rtol=1e-12, atol=1e-12)


def test_where_the_rows_are_turned_and_no_programs_are_there_it_is_the_same_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an accelerator without Triton."""
    monkeypatch.setattr(Square, "_turns_rows", lambda self, rows: True)
    for square in squares():
        shape = square.out_features, square.in_features
        matrix = torch.randn(square.side, square.side, dtype=torch.float64)
        delta = reference.square_delta(matrix, shape, turn=square.turn)
        rows, grad = (torch.randn(9, features, dtype=torch.float64) for features in reversed(shape))
        product, grad_rows = torch.zeros_like(grad), torch.ones_like(rows)
        square.add_product(product, rows, (matrix,), MATRIX)
        (found,) = square.add_gradient(grad_rows, BackwardPass(grad), rows, (matrix,), MATRIX)
        torch.testing.assert_close(product, rows @ delta.t())
        torch.testing.assert_close(grad_rows, 1 + grad @ delta)
        torch.testing.assert_close(found, reference.square_gradient(grad.t() @ rows, square.side, turn=square.turn))
        order = torch.tensor([3, 0, 8])
        assert torch.equal(square.gathered(rows, order), square.compress(rows[order]))


@pytest.mark.parametrize("square", squares(), ids=str)
def test_few_tokens_in_half_precision_are_rounded_once_before_they_are_added(square: Square) -> None:
    matrix, dtype = torch.randn(square.side, square.side), torch.bfloat16
    x = torch.randn(square.side - 1, square.in_features).to(dtype)  # of more tokens, it is M that is turned
    assert len(x) <= PROCESSOR.few[dtype.itemsize]
    product = torch.zeros(len(x), square.out_features, dtype=dtype)
    square.add_product(product, x, (matrix,), MATRIX)
    want = x.double() @ square.delta((matrix.double(),)).t()
    assert bool(((product.double() - want).abs() <= 0.51 * torch.finfo(dtype).eps * want.abs() + 1e-5).all())


@pytest.mark.parametrize("square", squares(), ids=str)
def test_each_map_and_its_transpose(square: Square) -> None:
    """``<compress(x), g> == <x, expand(g)>`` and ``<spread(g), y> == <g, gather(y)>``."""
    x = torch.randn(2, 3, square.in_features, dtype=torch.float64)
    y = torch.randn(2, 3, square.out_features, dtype=torch.float64)
    groups = torch.randn(2, 3, square.groups, square.side, dtype=torch.float64)
    assert square.compress(x).shape == groups.shape
    assert square.expand(groups).shape == x.shape
    assert square.spread(groups).shape == y.shape
    assert square.gather(y).shape == groups.shape
    assert (square.compress(x) * groups).sum() == pytest.approx((x * square.expand(groups)).sum().item(), rel=1e-12)
    assert (square.spread(groups) * y).sum() == pytest.approx((groups * square.gather(y)).sum().item(), rel=1e-12)


@pytest.mark.parametrize("square", squares(), ids=str)
def test_every_input_and_every_output_takes_part(square: Square) -> None:
    """4096 -> 1024 in small: more chunks than blocks, where the authors' code drops the surplus inputs."""
    delta = square.delta((torch.randn(square.side, square.side, dtype=torch.float64),))
    assert bool(delta.ne(0).any(0).all()), "an input that nothing reads"
    assert bool(delta.ne(0).any(1).all()), "an output that nothing reaches"


def test_rotation_turns_pairs_by_the_angles_of_the_chunk() -> None:
    """Side 4: feature 0 pairs with 2 at frequency 1, feature 1 with 3 at frequency 10000^(-1/2) = 1/100."""
    square = Square(12, 12, 4, turn=True)
    x = torch.eye(12, dtype=torch.float64)
    turned = square.compress(x)  # as many blocks as chunks: every chunk is a group of its own
    for chunk in range(3):
        first, second = turned[4 * chunk, chunk], turned[4 * chunk + 1, chunk]
        assert first.tolist() == pytest.approx([math.cos(chunk), 0, math.sin(chunk), 0], abs=1e-15)
        assert second.tolist() == pytest.approx([0, math.cos(chunk / 100), 0, math.sin(chunk / 100)], abs=1e-15)
        third = turned[4 * chunk + 2, chunk]
        assert third.tolist() == pytest.approx([-math.sin(chunk), 0, math.cos(chunk), 0], abs=1e-15)


def test_rotation_in_float32_is_good_to_float32() -> None:
    """Angles up to the number of chunks (200 here) are computed in float32: its rounding times the angle."""
    square = Square(1600, 8, 8, turn=True)
    matrix = torch.randn(8, 8)
    want = plain_formula.square_rotation(matrix.double(), (8, 1600))
    error = (square.delta((matrix,)).double() - want).abs().max() / want.abs().max()
    assert error < 200 * torch.finfo(torch.float32).eps


def test_sharing_by_hand() -> None:
    square = Square(5, 3, 2, turn=False)
    delta = square.delta((torch.tensor([[1.0, 2.0], [3.0, 4.0]]),))
    assert delta.tolist() == [[1, 2, 1, 2, 1], [3, 4, 3, 4, 3], [1, 2, 1, 2, 1]]


@pytest.mark.parametrize("square", squares(), ids=str)
def test_norms_without_the_sum_built(square: Square) -> None:
    """Also those of one row by itself: every block of rows, the shorter last one included."""
    weight = torch.randn(square.out_features, square.in_features, dtype=torch.float64)
    matrix = torch.randn(square.side, square.side, dtype=torch.float64)
    want = (weight + square.delta((matrix,))).square().sum(1)
    got = square.squared_norms(weight, weight.square().sum(1), matrix)
    assert torch.allclose(got, want, rtol=1e-12)
    assert torch.equal(square.squared_norms(weight, want, torch.zeros_like(matrix)), want)


@pytest.mark.parametrize("square", squares(), ids=str)
def test_an_update_that_cancels_a_row_never_gives_a_negative_square(square: Square) -> None:
    matrix = torch.randn(square.side, square.side)
    weight = -square.delta((matrix,))
    got = square.squared_norms(weight, weight.square().sum(1), matrix)
    assert bool((got >= 0).all())
    assert bool((got <= 1e-5 * weight.square().sum(1)).all())
