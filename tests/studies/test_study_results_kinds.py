"""What a study compares where the measure is no share of rows, and where it is a mean of test sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from scipy.stats import ttest_rel

from trimtab.errors import ConfigError
from trimtab.runs.results import ChoiceResult, EntitiesResult, NumberResult, Result
from trimtab.studies.study_results import _difference, _doubts, _summary


class Run:
    """What is asked of a study's run."""

    steps = 5

    def __init__(self, seed: int, result: Any) -> None:
        self.seed, self.tests = seed, {"t": result}


def entities(f1: float, correct: str) -> EntitiesResult:
    return EntitiesResult(kind="entities", rows=4, choices=["O"], words=9, figures={"entity_f1": f1}, correct=correct)


def number(rmse: float, rows: int = 2) -> NumberResult:
    return NumberResult(kind="number", rows=rows, spread=1.0, figures={"rmse": rmse})


def test_an_f1_differs_by_itself_and_not_by_its_rows() -> None:
    mine = [Run(seed, entities(f1, "1111")) for seed, f1 in enumerate((0.90, 0.92, 0.91))]
    other = [Run(seed, entities(f1, "0000")) for seed, f1 in enumerate((0.88, 0.89, 0.90))]
    found: Any = _difference(mine, other, ["t"])  # type: ignore[arg-type]
    assert found.mean == pytest.approx(0.02)  # and not 1, by which the rows differ
    assert (found.seeds, found.rows) == (3, 0)


def test_an_error_is_compared_by_the_seeds_and_accuracy_by_rows() -> None:
    mine, other = (
        [Run(seed, number(rmse)) for seed, rmse in enumerate(each)] for each in ((21.5, 20.5, 22.0), (23.0, 22.5, 23.0))
    )
    found: Any = _difference(mine, other, ["t"])  # type: ignore[arg-type]
    assert (found.mean, found.seeds, found.rows) == (-1.5, 3, 0)
    assert found.p == pytest.approx(ttest_rel([21.5, 20.5, 22.0], [23.0, 22.5, 23.0]).pvalue)
    assert _difference(mine[:1], other[:1], ["t"]) is None  # type: ignore[arg-type]
    assert _difference(mine, [Run(seed, number(1.0, rows=3)) for seed in range(3)], ["t"]) is None  # type: ignore[arg-type]
    figures = {"accuracy": 0.5}
    made = {"choices": ["a", "b"], "confusion": [[2, 0], [2, 0]], "figures": figures, "rows": 4}
    choices = [Run(0, ChoiceResult(kind="choice", correct="1010", **made))]
    other = [Run(0, ChoiceResult(kind="choice", correct="0000", **made))]
    found: Any = _difference(choices, other, ["t"])  # type: ignore[arg-type]
    assert (found.mean, found.rows) == (0.5, 4)


def choice(correct: str, labels: str = "ab") -> ChoiceResult:
    share, rows = correct.count("1") / len(correct), len(correct)
    made = {"choices": [*labels], "confusion": [[rows, 0], [0, 0]], "figures": {"accuracy": share}, "rows": rows}
    return ChoiceResult(kind="choice", correct=correct, **made)


def summary(means: dict[str, list[str]], of_arm: dict[str, list[dict[str, Result]]]) -> dict[tuple[str, str], Any]:
    """(test set or mean, arm) -> its line, for arms with a run for each seed."""
    costs = {"trainable_parameters": 1, "training_seconds": 1.0, "peak_memory_gib": 1.0}
    runs: list[Any] = [
        SimpleNamespace(task="all", arm=arm, seed=seed, learning_rate=1e-3, steps=5, tests=tests, **costs)
        for arm, each in of_arm.items()
        for seed, tests in enumerate(each)
    ]
    said = SimpleNamespace(tasks=["all"], arms=list(of_arm), means=means)
    study: Any = SimpleNamespace(said=said, against=lambda arm: None if arm == "reference" else "reference")
    return {(line.test, line.arm): line for line in _summary(study, runs)}


def test_in_a_mean_of_test_sets_each_counts_as_one() -> None:
    """However many rows it has; the rows are paired all the same."""
    arm = [{"few": choice("11"), "many": choice(many)} for many in ("0000", "1000", "0100")]
    reference: list[dict[str, Result]] = [{"few": choice("10"), "many": choice("0000")}] * 3
    found = summary({"both": ["few", "many"]}, {"arm": arm, "reference": reference})  # type: ignore[dict-item]
    line = found["both", "arm"]
    assert line.mean == pytest.approx((1 + (0 + 1 / 4 + 1 / 4) / 3) / 2)
    assert (line.rows, line.measure, line.n) == (6, "accuracy", 3)
    assert line.difference.mean == pytest.approx(line.mean - 1 / 4)
    assert (line.difference.rows, line.difference.seeds) == (6, 3)
    assert found["both", "reference"].mean == 1 / 4
    assert [test for test, _ in found] == ["few", "few", "many", "many", "both", "both"]
    assert found["few", "arm"].difference.mean == pytest.approx(1 / 2)


def test_a_mean_is_of_test_sets_that_are_measured_alike() -> None:
    sets: dict[str, Result] = {"right": choice("10"), "found": entities(0.5, "1010")}
    with pytest.raises(ConfigError, match=r"means: 'both': .* got 'right' by accuracy, 'found' by entity F1"):
        summary({"both": ["right", "found"]}, {"reference": [sets]})
    alike: dict[str, Result] = {"one": entities(0.5, "1010"), "two": entities(0.7, "0010")}
    found = summary(
        {"both": ["one", "two"], "elsewhere": ["one", "three"]}, {"reference": [alike, alike], "arm": [alike]}
    )
    assert found["both", "arm"].mean == pytest.approx(0.6)
    assert not any(test == "elsewhere" for test, _ in found), "no run of this task has the set 'three'"


def test_rows_that_cannot_be_paired_are_not_compared_and_arms_without_a_test_set_have_no_line() -> None:
    def runs(correct: str) -> Any:
        return [Run(seed, choice(correct)) for seed in range(2)]

    assert _difference(runs("101"), runs("1010"), ["t"]) is None
    assert _difference(runs("1"), runs("0"), ["t"]) is None
    lines = summary({}, {"reference": [{"t": choice("10"), "u": choice("10")}], "dora": [{"t": choice("11")}]})
    assert set(lines) == {("t", "reference"), ("t", "dora"), ("u", "reference")}


@pytest.mark.parametrize(
    ("mine", "theirs", "files", "told"),
    [
        ("10", "11", ("a", "a"), []),
        ("101", "11", ("a", "b"), ["t: dora was tested on 3 rows and lora on 2; they are not compared."]),
        ("1", "0", ("a", "a"), ["t: one row is too few to compare dora with lora."]),
        ("10", "11", ("a", "b"), ["t: dora and lora were tested on different files. They are compared row by row"]),
        ("10", "11", ("a red", "a blue"), ["t: dora and lora were tested on different files."]),  # other pictures
    ],
)
def test_what_speaks_against_a_comparison_is_told(
    mine: str, theirs: str, files: tuple[str, str], told: list[str]
) -> None:
    study: Any = SimpleNamespace(against=lambda arm: "lora" if arm == "dora" else None)
    runs: Any = [
        SimpleNamespace(task="all", arm=arm, tests={"t": choice(correct)})
        for arm, correct in (("dora", mine), ("lora", theirs))
    ]
    tested = {
        ("all", arm): {
            "t": {"file": f"{arm}.jsonl", **dict(zip(("sha256", "pictures"), content.split(), strict=False))}
        }
        for arm, content in zip(("dora", "lora"), files, strict=True)
    }
    found = list(_doubts(study, runs, tested))
    assert [one.startswith(start) for one, start in zip(found, told, strict=True)] == [True] * len(told)
