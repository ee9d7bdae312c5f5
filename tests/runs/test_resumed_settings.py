"""What may change when a run is resumed, and how it is refused otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimtab.config.read import build_config
from trimtab.config.run import RunConfig
from trimtab.errors import RunError
from trimtab.runs.beginning import Changes, changes, differences


def config(**sections: Any) -> RunConfig:
    said: dict[str, Any] = {
        "model": "an/model",
        "data": {"train": "/rows.jsonl", "test": {"harbour": "/harbour.jsonl", "sea": "/sea.jsonl"}},
        "train": {"epochs": 2, "max_steps": 40},
        "output": "out",
    }
    for name, value in sections.items():
        said[name] = {**said[name], **value} if isinstance(said.get(name), dict) else value
    return build_config(said, Path("/"), "run.yaml")


def changed(**sections: Any) -> Changes:
    return changes("runs/x", config(), config(**sections), "trimtab finetune runs/x/config.yaml --resume")


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"output": "elsewhere"},
        {"evaluation": {"batch_size": 3, "before": False}},
        {"train": {"log_every": 1, "save_every": 7, "keep_checkpoints": 4, "tensorboard": True}},
        {"model": {"name": "an/model", "attention": "eager", "liger": False}, "train": {"padding_free": False}},
    ],
    ids=["nothing", "another folder", "how it is evaluated", "what is written", "what another device has"],
)
def test_what_changes_nothing_that_is_there(sections: dict[str, Any]) -> None:
    assert changed(**sections) == Changes()


@pytest.mark.parametrize(
    "train", [{"epochs": 3}, {"max_steps": 41}, {"max_steps": None}, {"epochs": 2.5, "max_steps": 50}]
)
def test_more_steps_are_more_training(train: dict[str, Any]) -> None:
    assert changed(train=train) == Changes(longer=True)


def test_test_sets_are_measured_anew_where_it_matters() -> None:
    assert changed(evaluation={"limit": 5}).measured_anew == {"harbour", "sea"}
    assert changed(evaluation={"max_new_tokens": 5}).measured_anew == {"harbour", "sea"}
    moved = {"test": {"harbour": "/other.jsonl", "sea": "/sea.jsonl", "third": "/third.jsonl"}}
    assert changed(data=moved).measured_anew == {"harbour", "third"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"seed": 4}}, r"train\.seed was 0, now 4\. Resume it with its own: trimtab finetune runs/x/"),
        ({"train": {"epochs": 1}}, r"train\.epochs was 2(\.0)?, now 1"),
        ({"train": {"max_steps": 39}}, r"train\.max_steps was 40, now 39"),
        ({"train": {"epochs": 9, "learning_rate": 1.0}}, r"train\.learning_rate was 0\.0005, now 1\.0\. Resume"),
        ({"model": "another/model"}, r'model\.name was "an/model", now "another/model"'),
        ({"plan": [{"match": "*", "method": "lora", "rank": 1}]}, r"plan was \[\{.*, now \[\{"),
        ({"data": {"max_length": 99}}, r'data\.max_length was "auto", now 99'),
    ],
)
def test_anything_else_is_refused_with_both_values(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(RunError, match=rf"runs/x: the run began with other settings: {words}"):
        changed(**sections)


def test_no_limit_of_steps_cannot_become_one() -> None:
    before, now = config(train={"max_steps": None}), config()
    with pytest.raises(RunError, match=r"train\.max_steps was null, now 40"):
        changes("runs/x", before, now, "")


def test_differences_are_named_by_their_keys() -> None:
    before, now = {"a": {"b": 1, "c": [1]}, "d": 0}, {"a": {"b": 2, "c": [1]}, "e": 0}
    assert sorted(differences(before, now)) == ["a.b", "d", "e"]
