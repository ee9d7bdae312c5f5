"""What is said of a test set, with every figure from the fixtures, where it is known by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy.stats import binomtest

from trimtab.reports.run.run_tables import baseline, headline, interval, measured
from trimtab.runs.read import TestSet, read_sets
from trimtab.runs.results import read_result


def _set(run: Path, name: str) -> TestSet:
    return next(tests for tests in read_sets(run) if tests.name == name)


def test_a_share_changes_by_points_and_a_perplexity_by_a_percentage(run: Path, open_run: Path) -> None:
    told = {
        row.metric.name: (row.words(row.before), row.words(row.after), row.change)
        for row in measured(_set(run, "kind"))
    }
    assert told == {
        "accuracy": ("33.3 %", "66.7 %", "+33.3"),
        "macro_f1": ("25.0 %", "62.5 %", "+37.5"),
        "weighted_f1": ("25.0 %", "62.5 %", "+37.5"),
        "perplexity": ("4.000", "2.000", "−50.0 %"),
    }
    assert [(row.metric.name, row.change) for row in measured(_set(open_run, "tales"))] == [("perplexity", "−25.0 %")]


def test_the_headline_says_what_answers_without_a_look_would_give(run: Path, open_run: Path, exam_run: Path) -> None:
    for folder, name, beside in (
        (run, "kind", "always answering 'no' would give 50.0 %"),
        (exam_run, "exam", "guessing would give 25.0 %"),
        (open_run, "test", "25.0 % of the answers cannot be used"),
        (open_run, "tales", ""),
    ):
        assert headline(_set(folder, name)).beside == beside
    assert baseline(_set(open_run, "test").result) is None


def test_numbers_are_held_against_their_mean_and_tags_against_the_commonest() -> None:
    shared = {"dataset": "test", "rows": 4, "seconds": 1.0}
    numbers = read_result({**shared, "kind": "number", "rmse": 2.0, "spread": 2.5})
    mean = baseline(numbers)
    assert mean is not None
    assert (mean.how, mean.told) == ("always answering the mean", "2.500")
    assert [mean.reaches(value) for value in (2.0, 2.5, 3.0, None)] == [False, True, True, False]
    most = {"answer": "O", "accuracy": 0.8}
    tags = {"kind": "tags", "words": 9, "accuracy": 0.7, "choices": ["O"], "confusion": [[9]], "majority": most}
    always = baseline(read_result({**shared, **tags}))
    assert always is not None
    assert (always.how, always.told) == ("always answering 'O'", "80.0 %")
    assert [always.reaches(value) for value in (0.7, 0.8, 0.9)] == [True, True, False]


@pytest.mark.parametrize(("right", "rows"), [(0, 5), (5, 5), (17, 40), (1030, 1212)])
def test_the_interval_is_wilsons(right: int, rows: int) -> None:
    wanted = binomtest(right, rows).proportion_ci(0.95, method="wilson")
    # The quantile of the normal distribution is written with seven figures.
    assert interval(right / rows, rows) == pytest.approx((wanted.low, wanted.high), abs=1e-6)
