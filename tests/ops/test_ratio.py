"""The ratio of magnitude to norm: digits in half precision, rows, and norms of zero."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops import ratio as ops_ratio
from trimtab.ops.ratio import ratio_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("spread", "in_place"), [(0.4, False), (0.4, True), (3.0, False), (3.0, True)])
def test_ratios_keep_their_digits_in_half_precision(dtype: torch.dtype, spread: float, in_place: bool) -> None:
    """The product is exact to a rounding, and the excess over 1 costs at most half a rounding of its own (0.4 times
    half a unit)."""
    values = torch.randn(64, 33).to(dtype)
    scale = 1 + spread * (2 * torch.rand(33) - 1)
    ratio = ratio_of(scale, torch.ones(33), dtype)
    assert ratio.near_one is (spread < 0.5)
    exact = values.double() * scale.double()
    got = ratio.times(values.clone(), in_place)
    unit = torch.finfo(dtype).eps
    assert got.dtype == dtype
    assert bool(((got.double() - exact).abs() <= 0.5 * unit * exact.abs() + 0.25 * unit * values.double().abs()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_multiplied_like_outputs(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 4).to(dtype)
    ratio = ratio_of(1 + torch.rand(6) / 4, torch.ones(6), dtype)
    assert torch.equal(ratio.times_rows(weight), ratio.times(weight.t()).t())


def test_a_norm_of_zero_gives_a_ratio_of_zero() -> None:
    ratio = ratio_of(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 2.0]), torch.float32)
    assert ratio.values.tolist() == [0.0, 1.0]
    assert not ratio.near_one


@pytest.mark.parametrize("largest", [1.25, 4.0])  # of which a half-precision copy of c - 1 is kept, or none
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_multiplied_stays_unless_it_is_given_up(dtype: torch.dtype, largest: float) -> None:
    weight = torch.randn(6, 6).to(dtype)
    before = weight.clone()
    ratio = ratio_of(torch.linspace(1, largest, 6), torch.ones(6), dtype)
    ratio.times(weight)
    ratio.times_rows(weight)
    assert torch.equal(weight, before)
    assert ratio.times(weight, in_place=True) is weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_looked_at_is_divided_and_not_taken_to_be_near_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator. In float16 the least magnitude would be rounded to zero, so nothing is read off there."""
    monkeypatch.setattr(ops_ratio, "_may_be_read", lambda norm: False)
    magnitude, norm = torch.tensor([3.0, 1.0, -2.0]), torch.tensor([2.0, 4.0, 0.5])
    for quotients in (None, lambda *_: None):  # none there, or one that does not read these
        found = ratio_of(magnitude, norm, dtype, quotients)
        assert found.values.tolist() == [1.5, 0.25, -4.0]
        assert found.near_one is False
        assert found.excess is None
        assert (found.divisor is None) == (dtype == torch.float16)
        assert found.divisor is None or torch.equal(found.divisor, magnitude)
    theirs = torch.ones(3), torch.zeros(3)
    found = ratio_of(magnitude, norm, dtype, lambda *_: theirs)
    if dtype != torch.float16:
        assert (found.values, found.divisor) == theirs
