"""A finished run that is trained further: what is promised of its rates, its averages and its records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stopped_runs import adapter_of, interrupt, metrics_of, signals_are_heard
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.files import read_json
from trimtab.runs.folder import RunFolder
from trimtab.training.run import finetune

__all__ = ["signals_are_heard"]
pytestmark = pytest.mark.usefixtures("bare_runs")
DROPOUT = [{"match": "all-linear", "method": "dora", "rank": 4, "alpha": 8, "dropout": 0.2}]


def longer(config: RunConfig, epochs: float) -> RunConfig:
    """The configuration of the run in that folder, with more epochs."""
    return load_config(RunFolder(config.output).config, [f"train.epochs={epochs}"])


def same_adapter(one: RunConfig, other: RunConfig) -> bool:
    first, second = adapter_of(one), adapter_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("average", [None, pytest.param(0.5, marks=pytest.mark.full)])
def test_where_the_rate_stays_two_epochs_and_two_more_are_four(
    make_config: Callable[..., Any], average: float | None
) -> None:
    train = {"schedule": "constant", "warmup": 2, "average": average, "keep_best": False}
    settings = {"count": 18, "plan": DROPOUT, "data": {"validation": 0.2}}
    whole = make_config("whole", **settings, train={**train, "epochs": 4})
    parts = make_config("parts", **settings, train={**train, "epochs": 2})
    finetune(whole)
    finetune(parts)
    assert not same_adapter(whole, parts)
    finetune(longer(parts, 4), resume=True)
    assert same_adapter(whole, parts)
    trained = [[line for line in metrics_of(config) if line["kind"] == "train"] for config in (whole, parts)]
    assert trained[0] == trained[1]
    # A validation at the end of the first part was one of its average; of the whole there was none yet.
    assert (metrics_of(whole) == metrics_of(parts)) == (average is None)


@pytest.mark.full
def test_the_rate_goes_on_as_in_a_run_of_all_the_steps(make_config: Callable[..., Any]) -> None:
    settings = {"count": 16, "train": {"epochs": 4, "schedule": "linear", "warmup": 2, "keep_best": False}}
    whole = make_config("whole", **settings)
    parts = make_config("parts", **{**settings, "train": {**settings["train"], "epochs": 2}})  # type: ignore[dict-item]
    finetune(whole)
    finetune(parts)
    before = metrics_of(parts)
    assert before[-1]["learning_rate"] < 2e-3
    interrupt(longer(parts, 4), resume=True, step=10)
    finetune(longer(parts, 4), resume=True)
    assert metrics_of(parts)[: len(before)] == before
    rates = [[line["learning_rate"] for line in metrics_of(config)] for config in (whole, parts)]
    assert rates[1][len(before) :] == rates[0][len(before) :]
    summary = read_json(parts.output / "summary.json")
    assert (summary["status"], summary["steps"], summary["epochs"]) == ("finished", 16, 4.0)
    assert (
        "trained further, from step 8 to step 16: the learning rate goes on as in a run of 16 steps"
        in (summary["notes"])
    )
    assert load_config(RunFolder(parts.output).config).train.epochs == 4


def test_more_epochs_than_there_are_steps_for_are_told(make_config: Callable[..., Any]) -> None:
    config = make_config(train={"epochs": 1, "max_steps": 3})
    finetune(config)
    before = metrics_of(config)
    finetune(longer(config, 2), resume=True)
    assert metrics_of(config) == before
    summary = read_json(config.output / "summary.json")
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert "nothing is left to train: train.epochs and train.max_steps come to 3 steps, as before" in summary["notes"]


def test_a_run_that_stopped_early_goes_on(make_config: Callable[..., Any]) -> None:
    config = make_config(
        count=16, data={"validation": 0.2}, train={"epochs": 1, "early_stopping": 5, "validate_every": 2}
    )
    finetune(config)
    steps = read_json(config.output / "summary.json")["steps"]
    finetune(longer(config, 2), resume=True)
    assert read_json(config.output / "summary.json")["steps"] == 2 * steps
