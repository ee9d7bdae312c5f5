"""A run in two processes is the run of one: the same losses and figures, the same adapter, one set of files; it goes on
in any number of processes, and ends in all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stopped_runs import adapter_of, metrics_of, signals_are_heard
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.files import read_json, read_jsonl
from trimtab.training.run import finetune
from two_runs import RUNS, SAID, yaml_of

__all__ = ["signals_are_heard"]
pytestmark = pytest.mark.usefixtures("bare_runs")


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, RunConfig]:
    """The same runs in this process."""
    found = {}
    for name in SAID:
        found[name] = load_config(yaml_of(root, name, name))
        finetune(found[name])
    return found


def _near(one: RunConfig, two: Path, steps_apart: float = 1e-6) -> None:
    """Both runs have the same lines of metrics, figures and adapter, but for rounding.

    Adam divides a gradient by its own size, so where one has all but vanished its rounding shows in the adapter: half a
    percent of a step at the usual rate is let pass there, and nothing in the losses.
    """
    other = one.model_copy(update={"output": two})
    mine, theirs = metrics_of(one), metrics_of(other)
    assert len(mine) == len(theirs)
    for line, twin in zip(mine, theirs, strict=True):
        assert line.keys() == twin.keys()
        for key, value in line.items():
            apart = 10 * steps_apart if key == "grad_norm" else steps_apart
            assert twin[key] == (pytest.approx(value, rel=apart) if isinstance(value, float) else value), key
    adapter, twin_adapter = adapter_of(one), adapter_of(other)
    assert adapter.keys() == twin_adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, twin_adapter[name], rtol=1e-4, atol=5e-5)
    for file in sorted((one.output / "evaluation").glob("*.json")):
        figures, twins = read_json(file), read_json(two / "evaluation" / file.name)
        for key, value in figures.items():
            if key != "seconds":
                assert twins[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
        rows_of = [read_jsonl(place / "predictions" / f"{file.stem}.jsonl") for place in (one.output, two)]
        assert [row["predicted"] for row in rows_of[0]] == [row["predicted"] for row in rows_of[1]]


@pytest.mark.parametrize(("name", "sharding"), RUNS)
def test_two_processes_train_as_one(
    name: str, sharding: str, root: Path, alone: dict[str, RunConfig], told: dict[str, list[Any]]
) -> None:
    first, second = told[f"{name}-{sharding}"]
    assert isinstance(first, list), first
    assert second == [], "one display"
    spread = "the frozen weights spread over them" if sharding == "full" else "each with the whole model"
    assert f"2 processes, {spread}: 2 of 4 rows of a batch each" in first
    _near(alone[name], root / f"{name}-{sharding}")
    summary = read_json(root / f"{name}-{sharding}" / "summary.json")
    assert (summary["processes"], summary["status"]) == (2, "finished")
    assert summary["steps"] == read_json(alone[name].output / "summary.json")["steps"]


def test_one_that_is_told_to_end_ends_all_and_one_process_goes_on(
    root: Path, alone: dict[str, RunConfig], told: dict[str, list[Any]]
) -> None:
    first, second = told["stopped"]
    assert (first["error"], first["code"]) == ("Interrupted", 143)
    assert "--resume" in first["said"]
    assert (second["error"], second["code"]) == ("EndedElsewhere", 143)
    config = load_config(yaml_of(root, "chosen", "stopped"))
    assert [place.name for place in (config.output / "checkpoints").glob("checkpoint-4")]
    finetune(config, resume=True)
    _near(alone["chosen"], config.output)


def test_two_processes_go_on_with_what_one_began(
    root: Path, alone: dict[str, RunConfig], told: dict[str, list[Any]]
) -> None:
    assert "resuming at step 4" in told["resumed"][0], told["resumed"]
    _near(alone["chosen"], root / "resumed")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd", "train.batch_size: 5 rows .* set it to 4 or 6"),
        ("auto", "train.learning_rate: auto makes trials with the whole model.*trimtab tune"),
        ("refused", "this folder holds a run already"),
        ("fails", "no room for the model"),
        ("deepspeed", "accelerate's configuration asks for DeepSpeed"),
    ],
)
def test_an_error_is_told_once_and_ends_both(name: str, words: str, told: dict[str, list[Any]]) -> None:
    said = told[name]
    quiet = [one for one in said if one["error"] == "EndedElsewhere"]
    (loud,) = [one for one in said if one not in quiet]
    assert len(quiet) == 1
    assert re.search(words, loud["said"], re.DOTALL), loud
