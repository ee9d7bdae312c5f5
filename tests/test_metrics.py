"""Metrics of a closed set, against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.evaluation.closed_set import class_details
from trimtab.metrics import KINDS, METRICS, choosing, compared, main_metric, measure
from trimtab.outcomes import Outcomes
from trimtab.runs.results import ChoiceResult


def choice_metrics(truth: list[str], predicted: list[str], choices: list[str]) -> dict[str, Any]:
    """What the file of a result says of such answers."""
    outcomes = Outcomes(truth=truth, predicted=predicted, choices=choices)
    details, figures = class_details(outcomes), measure("choice", outcomes)
    return ChoiceResult(rows=len(truth), figures=figures, **details).plain()


def test_hand_computed() -> None:
    """Rows (true, predicted): 3 a-a, 1 a-b, 1 b-a, 2 b-b, 1 c-b; c is never predicted, and d never occurs at all."""
    truth = ["a", "a", "a", "a", "b", "b", "b", "c"]
    predicted = ["a", "a", "a", "b", "a", "b", "b", "b"]
    found = choice_metrics(truth, predicted, ["b", "a", "c", "d"])
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["confusion"] == [[2, 1, 0, 0], [1, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found["per_class"]["a"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "rows": 4}
    # b: 2 of 4 predictions right, 2 of 3 rows found: F1 = 2 * 2 / (4 + 3).
    assert found["per_class"]["b"] == pytest.approx({"precision": 0.5, "recall": 2 / 3, "f1": 4 / 7, "rows": 3})
    assert found["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "rows": 1}
    assert found["macro_f1"] == pytest.approx((4 / 7 + 0.75 + 0 + 0) / 4)
    assert found["weighted_f1"] == pytest.approx((3 * 4 / 7 + 4 * 0.75) / 8)
    assert found["majority"] == {"answer": "a", "accuracy": 0.5}
    assert list(found["per_class"]) == ["b", "a", "c", "d"]


def test_equal_majorities_go_to_the_first_choice() -> None:
    assert choice_metrics(["x", "y"], ["x", "x"], ["y", "x"])["majority"] == {"answer": "y", "accuracy": 0.5}


def test_plain_types_for_json() -> None:
    found = choice_metrics(["x", "y"], ["x", "x"], ["y", "x"])
    assert type(found["accuracy"]) is type(found["macro_f1"]) is type(found["weighted_f1"]) is float
    assert type(found["confusion"][0][0]) is type(found["per_class"]["x"]["rows"]) is int


def test_every_kind_of_result_has_a_main_metric_and_studies_compare_it() -> None:
    assert {kind: main_metric(kind).name for kind in KINDS} == {
        "choice": "accuracy",
        "multiple_choice": "accuracy",
        "generation": "exact_match",
        "perplexity": "perplexity",
        "labels": "micro_f1",
        "number": "rmse",
        "tags": "accuracy",
        "entities": "entity_f1",
    }
    assert all(main_metric(kind) in compared() for kind in KINDS)


def test_what_can_choose_the_best_step_depends_on_the_validation_rows() -> None:
    assert choosing("choice") == ["loss", "accuracy", "macro_f1"]
    assert choosing("multiple_choice") == ["loss", "accuracy"]
    assert choosing("number") == ["loss", "rmse", "pearson", "spearman", "mean_absolute_error"]
    assert choosing("generation") == choosing("perplexity") == ["loss"]


def test_a_metric_without_its_part_of_the_outcomes_is_left_out() -> None:
    open_answers = Outcomes(truth=["a", "b"], predicted=["a", "c"], correct=[True, False], usable=[True, True])
    assert measure("generation", open_answers) == {"exact_match": 0.5, "unusable": 0.0}
    assert measure("perplexity", Outcomes(loss=0.0, tokens=4)) == {"perplexity": 1.0}


def test_the_cost_of_a_better_value_is_lower() -> None:
    assert METRICS["accuracy"].cost(0.9) < METRICS["accuracy"].cost(0.8)
    assert METRICS["perplexity"].cost(2.0) < METRICS["perplexity"].cost(3.0)
