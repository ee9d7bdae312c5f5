"""A run in two processes is the run of one: the same losses and figures, the same adapter, one set of files; it goes on
in any number of processes, and ends in all of them."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sampling import sample
from stopped_runs import adapter_of, interrupt, metrics_of, signals_are_heard
from tiny_encoders import write_encoder
from tiny_runs import labelled, rows, write_config, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.files import read_json, read_jsonl
from trimtab.training.run import finetune
from two_processes import both, train

__all__ = ["signals_are_heard"]
pytestmark = pytest.mark.usefixtures("bare_runs")

MODELS = {"chosen": "model", "written": "model", "heads": "encoder"}
SAID: dict[str, dict[str, Any]] = {
    # 21 rows in batches of 4: the last one has one row, and the second process none.
    "chosen": {
        "data": {"validation": 0.2},
        "train": {"epochs": 2, "early_stopping": 3, "average": 0.4, "save_every": 3, "gradient_accumulation": 2},
    },
    "written": {
        "train": {"epochs": 1, "prompt_loss_weight": 0.1, "group_by_length": False},
        "evaluation": {"max_new_tokens": 4},
        "plan": [
            {"match": "all-linear", "method": "mora", "rank": 4},
            {"match": "lm_head", "method": "full"},
        ],
    },
    "heads": {"data": {"validation": 0.2}, "train": {"epochs": 1, "class_weights": "balanced"}},
}
RUNS = sample(
    [(name, sharding) for name in SAID for sharding in ("full", "none")], 5, [("chosen", "none"), ("written", "full")]
)


def _yaml(root: Path, name: str, place: str, **train: Any) -> Path:
    """The run called ``name``, into the folder ``place``."""
    said = {"chosen": rows, "written": lambda count: rows(count, "open"), "heads": labelled}[name]
    data = write_rows(root / f"{name}.jsonl", said(26))
    tests = {"asked": str(write_rows(root / f"{name}-asked.jsonl", said(35)[26:]))}
    sections = SAID[name]
    return write_config(
        root / f"{place}.yaml",
        root / MODELS[name],
        data,
        **{**sections, "data": {"test": tests, **sections.get("data", {})}, "train": {**sections["train"], **train}},
        output=str(root / place),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_model(folder / "model", tie_word_embeddings=False)
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write_encoder(folder / "encoder", kind="BertForMaskedLM", **nothing)
    return folder


@pytest.fixture(scope="module")
def told(root: Path) -> dict[str, list[Any]]:
    """What two processes say that have done all runs of this file."""

    def run(name: str, place: str, how: Mapping[str, Any] = {}, **said: Any) -> Callable[[int], Any]:
        return partial(train, yaml=str(_yaml(root, name, place, **said)), **how)

    _interrupted_alone(root)
    works = {f"{name}-{sharding}": run(name, f"{name}-{sharding}", sharding=sharding) for name, sharding in RUNS}
    works |= {
        "odd": run("chosen", "odd", batch_size=5),
        "auto": run("chosen", "auto", learning_rate="auto"),
        "stopped": run("chosen", "stopped", {"told_to_end": 4}),
        "resumed": run("chosen", "resumed", {"resume": True}),
        "refused": run("chosen", "chosen-none"),
        "fails": run("chosen", "fails", {"fails": 1}),
    }
    return both(works, root)


def _interrupted_alone(root: Path) -> None:
    """Leave a run in the folder ``resumed`` that one process has begun."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt(load_config(_yaml(root, "chosen", "resumed")), step=4)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, RunConfig]:
    """The same runs in this process."""
    found = {}
    for name in SAID:
        found[name] = load_config(_yaml(root, name, name))
        finetune(found[name])
    return found


def _near(one: RunConfig, two: Path, steps_apart: float = 1e-6) -> None:
    """Both runs have the same lines of metrics, figures and adapter, but for rounding."""
    other = one.model_copy(update={"output": two})
    mine, theirs = metrics_of(one), metrics_of(other)
    assert len(mine) == len(theirs)
    for line, twin in zip(mine, theirs, strict=True):
        assert line.keys() == twin.keys()
        for key, value in line.items():
            assert twin[key] == (pytest.approx(value, rel=steps_apart) if isinstance(value, float) else value), key
    adapter, twin_adapter = adapter_of(one), adapter_of(other)
    assert adapter.keys() == twin_adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, twin_adapter[name], rtol=1e-4, atol=2e-6)
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
    config = load_config(_yaml(root, "chosen", "stopped"))
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
        ("auto", "train.learning_rate: auto is for one process.*trimtab tune"),
        ("refused", "this folder holds a run already"),
        ("fails", "no room for the model"),
    ],
)
def test_an_error_is_told_once_and_ends_both(name: str, words: str, told: dict[str, list[Any]]) -> None:
    said = told[name]
    quiet = [one for one in said if one["error"] == "EndedElsewhere"]
    (loud,) = [one for one in said if one not in quiet]
    assert len(quiet) == 1
    assert re.search(words, loud["said"], re.DOTALL), loud
