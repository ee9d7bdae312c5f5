"""How the figures of a study are written."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.metrics import METRICS
from trimtab.reports.study.comparison import _p, _told, _with_interval, findings
from trimtab.reports.study.study_page import _tried
from trimtab.runs.records import MetricsLine
from trimtab.runs.study_records import CorrectedDifference, MeanInterval, StudyResults, SummaryLine, TriedRate

ONE = {"mean": 1.0, "low": None, "high": None, "n": 1}
COSTS = dict.fromkeys(("trainable_parameters", "training_seconds", "peak_memory_gib"), ONE)


@pytest.mark.parametrize(
    ("metric", "mean", "low", "high", "told"),
    [
        ("pearson", 0.9142, 0.9, 0.9284, "0.914 ± 0.014"),
        ("accuracy", 0.0, 0.0, 0.0, "0.0 ± 0.0"),
        ("accuracy", 0.9998, None, None, "99.98"),
        ("rmse", 23.46, None, None, "23.46"),
        ("rmse", 8.25e-8, 7.25e-8, 9.25e-8, "8.25e-08 ± 1.00e-08"),  # as 0.000 it would say nothing
        ("perplexity", 4.1234, 4.1, 4.1468, "4.123 ± 0.023"),
    ],
)
def test_a_mean_is_told_as_its_metric_is_everywhere(
    metric: str, mean: float, low: float | None, high: float | None, told: str
) -> None:
    assert _with_interval(METRICS[metric], MeanInterval(mean=mean, low=low, high=high, n=3)) == told


def test_a_p_that_is_told_as_a_difference_never_reads_as_the_limit() -> None:
    assert [_p(p, "= ") for p in (0.0004, 0.049, 0.0497, 0.05, 0.3)] == [
        "< 0.001",
        "= 0.049",
        "< 0.05",
        "= 0.050",
        "= 0.30",
    ]


def line(arm: str, difference: dict[str, Any] | None) -> dict[str, Any]:
    said = {"task": "all", "test": "kind", "arm": arm, "measure": "accuracy", "rows": 50, "majority": None}
    known = {"seeds": [0], "learning_rate": 1e-3, "mean": 0.5, "low": None, "high": None, "n": 1, "figures": {}}
    return {**said, **known, "costs": COSTS, "against": "lora" if difference else None, "difference": difference}


def told(**p: float) -> str:
    apart = {"mean": 0.1, "low": 0.01, "high": 0.19, "seeds": 1, "rows": 50, **p}
    lines = [SummaryLine.read(one) for one in (line("lora", None), line("dora", apart))]
    empty: dict[str, Any] = {key: [] for key in ("arms", "searches", "runs", "missing", "failed", "machines")}
    texts = dict.fromkeys(("title", "question", "file"), "")
    results = StudyResults(**empty, **texts, reference="lora", seeds=[0], search=None, summary=lines, said={})
    return " ".join(findings(results))


def test_chance_among_many_is_not_blamed_where_the_test_itself_says_no() -> None:
    assert "among so many comparisons" in told(p=0.02, p_holm=0.08)
    alone = told(p=0.0625, p_holm=0.0625)
    assert "among so many" not in alone
    assert "exact test" in alone


def test_a_rate_that_was_tried_is_told_by_its_metric() -> None:
    facts = dict.fromkeys(("trainable_parameters", "steps", "train_rows", "train_tokens"), 1)
    seconds = dict.fromkeys(("training_seconds", "peak_memory_gib", "total_seconds"), 1.0)
    for figures, loss, expected in (
        ({"rmse": 1.25, "pearson": 0.5}, 1.5625, "→ 0.01: RMSE 1.250, loss 1.562"),
        ({"accuracy": 0.8125}, 0.4, "→ 0.01: 81.2 %, loss 0.400"),
        ({}, 2.5e-5, "→ 0.01: loss 2.50e-05"),
    ):
        kept = MetricsLine(kind="validation", step=1, loss=loss, figures=figures)
        where: dict[str, Any] = {"task": "all", "arm": "lora", "seed": 0, "precision": "float32"}
        run = TriedRate(**facts, **seconds, **where, learning_rate=0.01, taken=True, validation=kept)
        assert _tried(run) == expected


@pytest.mark.parametrize(
    ("measure", "difference", "expected"),
    [
        ("rmse", (0.0033, -0.0453, 0.0519), ["+0.003", "−0.045", "+0.052"]),
        ("rmse", (-43.414, -45.63, -0.0004), ["−43.41", "−45.63", "0.00"]),
        ("rmse", (3.3e-9, -1e-9, 7.6e-9), ["+3.30e-09", "−1.00e-09", "+7.60e-09"]),
        ("accuracy", (0.0033, -0.0453, 0.0519), ["+0.3", "−4.5", "+5.2"]),
    ],
)
def test_a_difference_and_its_interval_have_the_same_digits(
    measure: str, difference: tuple[float, float, float], expected: list[str]
) -> None:
    mean, low, high = difference
    known = CorrectedDifference(mean=mean, low=low, high=high, p=0.5, p_holm=0.5, seeds=2, rows=0)
    assert _told(SummaryLine.read({**line("dora", None), "measure": measure}), known) == expected
