"""Sums of changes, against the plain formula in float64 and against PEFT's functions of the same names."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from trimtab.ops import combination
from trimtab.ops.combination import LowRankAdapter, weighted_sum


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def acting(weight: Tensor, adapter: LowRankAdapter, axis: str) -> Tensor:
    """Row by row, or column by column."""
    total = weight + adapter.b @ adapter.a
    if adapter.magnitude is None:
        return total
    rows = total if axis == "output" else total.T
    made = torch.stack([m * row / row.norm() for m, row in zip(adapter.magnitude, rows, strict=True)])
    return made if axis == "output" else made.T


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("shares", [(0.7, 0.3, 0.0), (1.0, 1.0, 1.0), (1.5, -0.8, 2.0)])
@pytest.mark.parametrize("plain", [(), (1,), (0, 1, 2)])
def test_a_sum_of_lora_and_dora_is_exact(axis: str, shares: tuple[float, ...], plain: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, size = randn(9, 7), 9 if axis == "output" else 7
    adapters = [
        LowRankAdapter(randn(rank, 7), 0.3 * randn(9, rank), None if one in plain else 1 + randn(size).abs())
        for one, rank in enumerate((2, 4, 1))
    ]
    wanted = weight + sum(
        share * (acting(weight, one, axis) - weight) for share, one in zip(shares, adapters, strict=True)
    )
    found = weighted_sum(weight, list(zip(shares, adapters, strict=True)), axis)  # type: ignore[arg-type]
    assert found.a.shape == (7, 7)
    assert (found.magnitude is None) == (len(plain) == 3)
    torch.testing.assert_close(acting(weight, found, axis), wanted, rtol=1e-11, atol=1e-11)


def test_rows_from_which_the_weight_goes_away_are_as_near_as_float32_shows() -> None:
    """Two adapters of magnitude zero, each with a share of one half, and a third: c' is 0 in the first row."""
    torch.manual_seed(0)
    weight = randn(3, 5)
    norms = weight.norm(dim=1)
    zero = torch.cat([torch.zeros(1, dtype=torch.float64), norms[1:]])
    nothing = LowRankAdapter(randn(0, 5), randn(3, 0), zero)
    plain = LowRankAdapter(randn(2, 5), randn(3, 2), None)
    parts = [(0.5, nothing), (0.5, nothing), (1.0, plain)]
    found = weighted_sum(weight, parts)
    wanted = weight + plain.b @ plain.a
    wanted[0] = (plain.b @ plain.a)[0]
    assert found.magnitude is not None
    torch.testing.assert_close(acting(weight, found, "output"), wanted, rtol=0, atol=3e-6)
    assert all(one.isfinite().all() for one in found if one is not None)
    alone = weighted_sum(weight, parts[:2])
    assert alone.magnitude is not None
    assert alone.magnitude.tolist()[0] == 0, "where nothing is added, zero is exact"


@pytest.mark.parametrize("left", [9e-7, -9e-7])
def test_a_ratio_that_is_all_but_zero_keeps_its_sign(left: float) -> None:
    """c' is held off zero by 1e-6, on the side on which it is: off by 1e-7 of the weight here, and not by 2e-6."""
    torch.manual_seed(0)
    weight, plain = randn(1, 5), LowRankAdapter(randn(2, 5), randn(1, 2), None)
    nothing = LowRankAdapter(randn(0, 5), randn(1, 0), torch.zeros(1, dtype=torch.float64))
    found = weighted_sum(weight, [(1 - left, nothing), (1.0, plain)])
    wanted = left * weight + plain.b @ plain.a
    assert float((acting(weight, found, "output") - wanted).norm()) == pytest.approx(1e-7 * float(weight.norm()))


def test_a_row_of_zeros_stays_one() -> None:
    weight = torch.zeros(2, 3, dtype=torch.float64)
    one = LowRankAdapter(randn(1, 3), torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    found = weighted_sum(weight, [(1.0, one), (2.0, one)])
    assert found.magnitude is not None
    assert torch.isfinite(found.b).all()
    assert torch.isfinite(found.magnitude).all()


def test_a_stack_is_combined_weight_by_weight() -> None:
    torch.manual_seed(0)
    weight = randn(3, 4, 5)
    adapters = [LowRankAdapter(randn(3, 2, 5), randn(3, 4, 2), 1 + randn(3, 4).abs()) for _ in range(2)]
    found = weighted_sum(weight, [(0.4, adapters[0]), (0.9, adapters[1])])
    plain = weighted_sum(
        weight, [(0.4, adapters[0]._replace(magnitude=None)), (0.9, adapters[1]._replace(magnitude=None))]
    )
    torch.testing.assert_close(
        plain.b @ plain.a, 0.4 * adapters[0].b @ adapters[0].a + 0.9 * adapters[1].b @ adapters[1].a
    )
    for number in range(3):
        each = [LowRankAdapter(*(part[number] for part in one if part is not None)) for one in adapters]
        alone = weighted_sum(weight[number], [(0.4, each[0]), (0.9, each[1])])
        for one, other in zip(found, alone, strict=True):
            assert one is not None
            torch.testing.assert_close(one[number], other)


def test_ties_is_what_peft_calls_so() -> None:
    torch.manual_seed(0)
    deltas, shares = [randn(6, 8) for _ in range(3)], [0.7, 0.2, 1.3]
    trimmed = [combination.largest(delta, 0.4) for delta in deltas]
    for delta, kept in zip(deltas, trimmed, strict=True):
        assert torch.equal(kept, merge_utils.magnitude_based_pruning(delta, 0.4))
        assert int((kept != 0).sum()) == int(0.4 * 48)
    theirs = merge_utils.ties(deltas, torch.tensor(shares, dtype=torch.float64), 0.4)
    torch.testing.assert_close(combination.elected(trimmed, shares), theirs)


def test_where_the_votes_are_even_ties_takes_the_positive_sign_as_peft_does() -> None:
    deltas = [torch.tensor([1.0, -2.0, 0.0, 3.0]), torch.tensor([-1.0, 2.0, 0.0, -1.0])]
    theirs = merge_utils.ties(deltas, torch.ones(2), 0.75)  # all but the zeros
    found = combination.elected(deltas, [1.0, 1.0])
    torch.testing.assert_close(found, theirs)
    assert found.tolist() == [1.0, 2.0, 0.0, 3.0]


def test_dare_keeps_its_share_and_the_mean() -> None:
    delta = 1 + randn(300, 400).abs()
    kept = combination.drawn(delta, 0.25, torch.Generator().manual_seed(5))
    assert float((kept != 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(kept[kept != 0], delta[kept != 0] / 0.25)
    assert float(kept.mean()) == pytest.approx(float(delta.mean()), rel=0.02)
    assert torch.equal(kept, combination.drawn(delta, 0.25, torch.Generator().manual_seed(5)))
