"""Correlations, against scipy and by hand."""

from __future__ import annotations

import pytest
from scipy import stats

from trimtab.analysis.correlation import centred, pearson

X, Y = [0.3, -1.2, 4.0, 2.2, 0.1, 9.0], [1.0, 0.4, 2.0, -3.0, 0.0, 2.5]


def test_pearson_is_scipys_whatever_the_unit() -> None:
    """Changes of weights are as small as 1e-9; 1e-12: rounding of sums of six terms."""
    assert pearson(X, Y) == pytest.approx(stats.pearsonr(X, Y).statistic, rel=1e-12)
    assert pearson([1e-9 * x for x in X], [1e6 * y for y in Y]) == pytest.approx(pearson(X, Y), rel=1e-12)


def test_no_correlation_where_there_is_none_to_speak_of() -> None:
    assert pearson([1, 2], [3, 4]) is None
    assert pearson([1, 1, 1], [1, 2, 3]) is None
    assert pearson([1, 2, 3], [5, 5, 5]) is None


def test_centred_takes_each_groups_mean_off() -> None:
    assert centred([1, 5, 3, 9, 4], ["a", "b", "a", "b", "c"]) == [-1, -2, 1, 2, 0]
    # Two groups that fall within, and rise from one to the other.
    x, y = [1, 2, 3, 11, 12, 13], [3, 2, 1, 13, 12, 11]
    groups = [0, 0, 0, 1, 1, 1]
    assert pearson(x, y) > 0.9  # type: ignore[operator]
    assert pearson(centred(x, groups), centred(y, groups)) == pytest.approx(-1)
