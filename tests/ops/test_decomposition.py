"""Magnitude and direction, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

import trimtab
from trimtab.ops import decomposition
from trimtab.ops.decomposition import magnitude_over_norm, row_changes, squared_norms, weight_change

WEIGHT = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -5.0]])


def test_decompose_by_hand() -> None:
    magnitude, direction = trimtab.decompose(WEIGHT)
    assert torch.equal(magnitude, torch.tensor([5.0, 0.0, 5.0]))
    assert torch.allclose(direction, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]))
    assert torch.allclose(magnitude[:, None] * direction, WEIGHT)


def test_decompose_by_hand_over_inputs() -> None:
    magnitude, direction = trimtab.decompose(WEIGHT, axis="input")
    assert torch.allclose(magnitude, torch.tensor([3.0, 41.0**0.5]))
    assert torch.allclose(direction, torch.tensor([[1.0, 4 / 41**0.5], [0.0, 0.0], [0.0, -5 / 41**0.5]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_decompose_works_in_full_digits(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 300).to(dtype)
    magnitude, direction = trimtab.decompose(weight)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    assert magnitude.dtype == direction.dtype == full
    # The sum of squares runs in float64; one rounding of the root is left.
    error = (magnitude.double() - weight.double().norm(dim=1)).abs() / magnitude
    assert error.max() <= 2 * torch.finfo(full).eps


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_decompose_refuses_what_is_not_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \[out, in\], got \[" + ", ".join(map(str, shape))):
        trimtab.decompose(torch.zeros(shape))


def test_squares_too_large_for_half_precision() -> None:
    weight = torch.full((2, 4), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    assert squared_norms(weight).tolist() == [360000.0, 360000.0]
    assert squared_norms(weight, "input").tolist() == [180000.0] * 4


@pytest.mark.parametrize("axis", ["output", "input"])
def test_blocks_change_nothing(axis: decomposition.Axis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are reduced block by block; here every block has two rows, the last one."""
    before, after = torch.randn(7, 5), torch.randn(7, 5)
    whole = squared_norms(before, axis), weight_change(before, after, axis)
    monkeypatch.setattr(decomposition, "_BLOCK_ELEMENTS", 10)
    assert len(decomposition.row_blocks(7, 5)) == 4
    parts = squared_norms(before, axis), weight_change(before, after, axis)
    assert torch.allclose(parts[0], whole[0], rtol=1e-14)
    assert parts[1] == pytest.approx(whole[1], rel=1e-14)


def test_weight_change_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    after = torch.tensor([[0.0, 1.0], [0.0, 4.0], [0.0, 0.0], [0.0, 5.0], [-3.0, 0.0]])
    #        turned by a right angle, twice as long, still nothing, out of nothing, turned round
    change = trimtab.weight_change(before, after)
    assert change.delta_magnitude == pytest.approx((0 + 2 + 0 + 5 + 0) / 5, rel=1e-15)
    assert change.delta_direction == pytest.approx((1 + 0 + 0 + 1 + 2) / 5, rel=1e-15)
    assert trimtab.weight_change(before.t(), after.t(), axis="input") == change
    assert trimtab.weight_change(before, before) == (0.0, 0.0)


def test_weight_change_of_half_precision_is_exact() -> None:
    """Two bfloat16 weights that differ by one unit in one element: the cosine is 1 - 6e-6, far below bfloat16."""
    before = torch.ones(1, 4, dtype=torch.bfloat16)
    after = before.clone()
    after[0, 0] += 2**-7
    change = trimtab.weight_change(before, after)
    first = 1 + 2**-7
    length = (first**2 + 3) ** 0.5
    assert change.delta_magnitude == pytest.approx(length - 2, rel=1e-12)
    assert change.delta_direction == pytest.approx(1 - (first + 3) / (2 * length), rel=1e-9)


def test_no_rounding_turns_a_row_by_less_than_nothing() -> None:
    weight = torch.randn(2000, 7, generator=torch.Generator().manual_seed(0))
    _, direction = row_changes(weight, 3 * weight)
    assert direction.min() == 0, "some cosines come out above 1"
    assert direction.max() < 1e-14
    _, turned = row_changes(weight, -3 * weight)
    assert turned.max() == 2, "and some below -1"


def test_weight_change_refuses_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[3, 2\]"):
        trimtab.weight_change(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="weight_change"):
        trimtab.weight_change(torch.zeros(3), torch.zeros(3))


def test_a_norm_of_zero_gives_a_ratio_and_gradients_of_zero() -> None:
    magnitude = torch.tensor([2.0, 2.0], requires_grad=True)
    norm = torch.tensor([4.0, 0.0], requires_grad=True)
    ratio = magnitude_over_norm(magnitude, norm)
    assert ratio.tolist() == [0.5, 0.0]
    ratio.sum().backward()
    assert magnitude.grad is not None
    assert norm.grad is not None
    assert magnitude.grad.tolist() == [0.25, 0.0]
    assert norm.grad.tolist() == [-2 / 16, 0.0]


def test_a_magnitude_that_shrinks_has_moved_as_far_as_one_that_grows() -> None:
    magnitude, _ = row_changes(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 5.0]]))
    assert magnitude.tolist() == [4.0, 4.0]
