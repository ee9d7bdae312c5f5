"""Intervals and paired comparisons against scipy, against counting, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from trimtab.studies.statistics import difference_of_seeds, holm, mcnemar, mean_interval, paired_difference


def test_a_mean_has_students_interval() -> None:
    values = [0.81, 0.84, 0.79, 0.83]
    found = mean_interval(values)
    want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((want.low, want.high), rel=1e-12)
    assert (found.mean, found.n) == (pytest.approx(0.8175), 4)
    # By a table: t(3) = 3.182 at 97.5 %.
    assert found.high - found.mean == pytest.approx(3.182446 * np.std(values, ddof=1) / 2, rel=1e-6)


def test_one_run_has_no_interval() -> None:
    assert (mean_interval([0.5]).low, mean_interval([0.5]).high) == (None, None)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (3, 3), (12, 4), (1, 9)])
def test_mcnemar_counts_the_throws_of_a_coin(wins: int, losses: int) -> None:
    """At least as far from even as (wins, losses), of all ways in which so many coins fall."""
    n = wins + losses
    far = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(wins - losses))
    assert mcnemar(wins, losses) == pytest.approx(far / 2**n)


def test_one_seed_is_a_paired_test_over_rows() -> None:
    arm, reference = "1110110111", "1010010011"
    found = paired_difference([arm], [reference])
    d = np.array([int(a) - int(b) for a, b in zip(arm, reference, strict=True)])
    want = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((want.low, want.high), rel=1e-12)
    assert found.p == mcnemar(3, 0)
    assert (found.mean, found.seeds, found.rows) == (pytest.approx(0.3), 1, 10)


def test_several_seeds_add_the_variance_of_rows_and_of_seeds() -> None:
    arm, reference = ["110110", "111010", "111110"], ["010110", "100011", "110010"]
    found = paired_difference(arm, reference)
    # By hand, with loops in place of arrays.
    d = [[int(a) - int(b) for a, b in zip(*pair, strict=True)] for pair in zip(arm, reference, strict=True)]
    mean = sum(map(sum, d)) / 18
    by_row = [sum(run[row] for run in d) / 3 for row in range(6)]
    by_seed = [sum(run) / 6 for run in d]
    rows = sum((one - mean) ** 2 for one in by_row) / 5 / 6
    seeds = sum((one - mean) ** 2 for one in by_seed) / 2 / 3
    freedom = (rows + seeds) ** 2 / (rows**2 / 5 + seeds**2 / 2)
    half = stats.t(freedom).ppf(0.975) * math.sqrt(rows + seeds)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert found.p == pytest.approx(2 * stats.t(freedom).sf(abs(mean) / math.sqrt(rows + seeds)))


def test_swapping_the_arms_turns_the_sign() -> None:
    pair = ["110110", "111010"], ["010110", "100011"]
    one, other = paired_difference(*pair), paired_difference(*reversed(pair))
    assert (one.mean, one.low, one.high, one.p) == (-other.mean, -other.high, -other.low, other.p)


def test_a_run_that_is_not_trained_is_set_against_each() -> None:
    assert paired_difference(["0101"], ["0111", "1101"]) == paired_difference(["0101", "0101"], ["0111", "1101"])


def test_no_difference_at_all() -> None:
    found = paired_difference(["0101", "1101"], ["0101", "1101"])
    assert (found.mean, found.p) == (0, 1)
    # A difference of this size would leave four rows without one in one case of forty.
    assert (1 - found.high) ** 4 == pytest.approx(0.025)
    assert found.low == -found.high
    every = paired_difference(["11111"], ["00000"])
    assert (every.mean, every.high, every.p) == (1, 1, pytest.approx(2 / 2**5))
    assert every.low < 1


@pytest.mark.parametrize("runs", [["01", "011"], ["1", "0"]])
def test_rows_that_cannot_be_paired_are_refused(runs: list[str]) -> None:
    with pytest.raises(ValueError, match="expected runs over the same rows, at least two"):
        paired_difference(runs[:1], runs[1:])


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_where_nothing_differs_hardly_anything_is_found(spread: float) -> None:
    """Three seeds on 300 rows that are easy or hard; ``spread`` is how much seeds differ. Of 400 such studies at most
    10 % may find a difference (5 % are meant; the approximation and chance allow for the rest), and most intervals
    hold zero in the same way."""
    chance = np.random.default_rng(0)

    def runs(easy: np.ndarray) -> list[str]:
        scores = easy + spread * chance.normal(size=(3, 1)) + 0.7 * chance.normal(size=(3, 300))
        return ["".join("01"[right] for right in run) for run in (scores > 0).astype(int)]

    found = []
    for _ in range(400):
        easy = 1 + 1.5 * chance.normal(size=300)
        found.append(paired_difference(runs(easy), runs(easy)))
    assert sum(one.p < 0.05 for one in found) <= 40
    assert all((one.p < 0.05) == (one.low > 0 or one.high < 0) for one in found)


def test_a_real_difference_is_found() -> None:
    """Two points in a hundred, on 1,200 rows on which the arms mostly agree."""
    chance = np.random.default_rng(0)
    easy = chance.uniform(size=1200)
    runs = [
        ["".join("01"[int(one < share)] for one in easy + 0.03 * chance.normal(size=1200)) for _ in range(3)]
        for share in (0.84, 0.82)
    ]
    found = paired_difference(*runs)
    assert found.p < 0.01
    assert found.low < 0.02 < found.high


def test_holm_steps_down() -> None:
    # By hand: sorted 0.01 x 4, 0.015 x 3, 0.03 x 2, 0.04 x 1, each at least the one before.
    assert holm([0.04, 0.01, 0.03, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    for ps in itertools.permutations([0.001, 0.02, 0.02]):
        assert sorted(holm(ps)) == pytest.approx([0.003, 0.04, 0.04])


def test_a_figure_that_is_no_mean_over_rows_is_compared_by_seeds() -> None:
    found = difference_of_seeds([0.90, 0.92, 0.91], [0.88, 0.89, 0.90])
    assert found is not None
    expected = stats.ttest_rel([0.90, 0.92, 0.91], [0.88, 0.89, 0.90])
    interval = expected.confidence_interval()
    assert (found.mean, found.p) == pytest.approx((0.02, expected.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    once = difference_of_seeds([0.1], [0.9, 0.8, 0.85])  # not trained, so there is one of it
    assert once is not None
    assert once.mean == pytest.approx(-0.75)
    assert difference_of_seeds([0.1], [0.2]) is None


def test_differences_that_are_equal_but_for_rounding_tell_nothing() -> None:
    assert len({0.3 - 0.1, 0.6 - 0.4, 0.9 - 0.7}) > 1
    assert difference_of_seeds([0.3, 0.6, 0.9], [0.1, 0.4, 0.7]) is None
    assert difference_of_seeds([3e-9, 4e-9], [1e-9, 1e-9]) is not None  # small figures that do differ
