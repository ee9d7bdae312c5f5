"""Metrics of a closed set, against values worked out by hand."""

from __future__ import annotations

import pytest

from trimtab.evaluation.metrics import choice_metrics


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
