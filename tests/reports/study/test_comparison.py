"""How the figures of a study are written."""

from __future__ import annotations

from trimtab.reports.study.comparison import _with_interval
from trimtab.runs.study_records import MeanInterval


def test_a_correlation_is_told_by_its_third_digit_and_a_share_in_percent_by_its_first() -> None:
    assert _with_interval(MeanInterval(mean=0.9142, low=0.9, high=0.9284, n=3), 1) == "0.914 ± 0.014"
    assert _with_interval(MeanInterval(mean=0.0, low=0.0, high=0.0, n=3), 100) == "0.0 ± 0.0"
    assert _with_interval(MeanInterval(mean=23.46, low=None, high=None, n=1), 1) == "23.5"
