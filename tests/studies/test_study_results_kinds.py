"""What a study compares where the measure is no share of rows."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.runs.results import ChoiceResult, EntitiesResult, NumberResult
from trimtab.studies.study_results import _difference


class Run:
    """What is asked of a study's run."""

    steps = 5

    def __init__(self, seed: int, result: Any) -> None:
        self.seed, self.tests = seed, {"t": result}


def entities(f1: float, correct: str) -> EntitiesResult:
    return EntitiesResult(kind="entities", rows=4, choices=["O"], words=9, figures={"entity_f1": f1}, correct=correct)


def test_an_f1_differs_by_itself_and_not_by_its_rows() -> None:
    mine = [Run(seed, entities(f1, "1111")) for seed, f1 in enumerate((0.90, 0.92, 0.91))]
    other = [Run(seed, entities(f1, "0000")) for seed, f1 in enumerate((0.88, 0.89, 0.90))]
    found: Any = _difference(mine, other, "t")  # type: ignore[arg-type]
    assert found.mean == pytest.approx(0.02)  # and not 1, by which the rows differ
    assert (found.seeds, found.rows) == (3, 0)


def test_numbers_are_not_compared_and_accuracy_by_rows() -> None:
    numbers = [Run(0, NumberResult(kind="number", rows=2, spread=1.0, figures={"rmse": 1.0}))] * 2
    assert _difference(numbers, numbers, "t") is None  # type: ignore[arg-type]
    figures = {"accuracy": 0.5}
    made = {"choices": ["a", "b"], "confusion": [[2, 0], [2, 0]], "figures": figures, "rows": 4}
    choices = [Run(0, ChoiceResult(kind="choice", correct="1010", **made))]
    other = [Run(0, ChoiceResult(kind="choice", correct="0000", **made))]
    found: Any = _difference(choices, other, "t")  # type: ignore[arg-type]
    assert (found.mean, found.rows) == (0.5, 4)
