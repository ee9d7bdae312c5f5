"""What a study's YAML may say, and the runs that it means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from source_paths import paths
from tiny_runs import rows, write_rows
from trimtab.config.resolve import plan_of
from trimtab.errors import ConfigError
from trimtab.studies.study_cells import load_study

STUDIES = Path(__file__).parents[2] / "studies"

LORA = {"match": "all-linear", "method": "lora", "rank": 2}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a study of two arms; keywords replace what it says, and None takes a key away."""
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", rows(24))
    write_rows(tmp_path / "data" / "test.jsonl", rows(9))

    def make(**said: Any) -> Path:
        study: dict[str, Any] = {
            "base": {
                "model": "tiny/model",
                "data": {"train": "data/train.jsonl", "test": "data/test.jsonl", "validation": None},
                "train": {"learning_rate": 1e-3, "batch_size": 4},
            },
            "arms": {
                "lora": {"plan": [LORA]},
                "dora": {"plan": [{**LORA, "method": "dora"}], "train": {"learning_rate": 2e-3}, "series": "d"},
            },
            "reference": "lora",
            **said,
        }
        path = tmp_path / "study.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in study.items() if value is not None}, sort_keys=False)
        )
        return path

    return make


def test_arms_differ_in_what_they_say_and_in_nothing_else(write: Callable[..., Path], tmp_path: Path) -> None:
    study = load_study(write())
    lora, dora = (study.configs["all", arm].model_dump() for arm in ("lora", "dora"))
    assert (lora["train"].pop("learning_rate"), dora["train"].pop("learning_rate")) == (1e-3, 2e-3)
    assert (lora.pop("plan")[0]["method"], dora.pop("plan")[0]["method"]) == ("lora", "dora")
    assert lora == dora
    assert lora["data"]["train"] == (str(tmp_path / "data" / "train.jsonl"),)  # relative to the study's file
    assert (study.series("lora"), study.series("dora")) == (None, "d")
    assert study.folder == tmp_path / "study"
    assert load_study(write(output="../there")).folder.resolve() == tmp_path.parent / "there"
    assert load_study(write(), out=Path("/else")).folder == Path("/else")


def test_a_cell_for_each_task_arm_and_seed(write: Callable[..., Path]) -> None:
    tasks = {"one": {}, "few rows": {"data": {"train_limit": 6}}}
    study = load_study(write(tasks=tasks, seeds=[3, 5]))
    cells = [cell for task in tasks for arm in ("lora", "dora") for cell in study.runs(task, arm, None)]
    assert [(cell.task, cell.arm, cell.seed, cell.config.train.seed) for cell in cells] == [
        (task, arm, seed, seed) for task in tasks for arm in ("lora", "dora") for seed in (3, 5)
    ]
    assert {cell.config.data.train_limit for cell in cells if cell.task == "few rows"} == {6}
    folders = [cell.config.output for cell in cells]
    assert len(set(folders)) == 8
    assert all(folder.is_relative_to(study.folder / "cells") for folder in folders)
    assert "few-rows/lora/seed-3-" in str(folders[4])


def test_every_arm_is_searched_with_equal_effort_and_without_test_rows(write: Callable[..., Path]) -> None:
    search = {"factors": [0.5, 2], "seed": 77, "settings": {"data": {"validation": 0.25, "train_limit": 12}}}
    arms = {"lora": {"plan": [LORA]}, "dora": {"train": {"learning_rate": 0.3}}, "none": {"train": {"epochs": 0}}}
    study = load_study(write(search=search, arms=arms))
    rates = {arm: [cell.learning_rate for cell in study.searches("all", arm)] for arm in arms}
    assert rates == {"lora": [5e-4, 2e-3], "dora": [0.15, 0.6], "none": []}
    for cell in study.searches("all", "lora"):
        data = cell.config.data
        assert (cell.seed, cell.config.train.seed) == (77, 77)
        assert (data.test, data.validation, data.train_limit) == ({}, 0.25, 12)
    runs = study.runs("all", "lora", 2e-3)
    assert [cell.config.train.learning_rate for cell in runs] == [2e-3] * 3
    assert runs[0].config.data.validation is None
    assert len(study.runs("all", "none", None)) == 1  # it has no seed to differ by


def test_what_a_run_is_said_to_be_decides_its_folder(write: Callable[..., Path]) -> None:
    first = load_study(write()).runs("all", "lora", None)[0]
    assert load_study(write()).runs("all", "lora", None)[0].config.output == first.config.output
    other = load_study(write(), ["train.batch_size=8"]).runs("all", "lora", None)[0]
    assert other.config.train.batch_size == 8
    assert other.config.output != first.config.output


def test_overrides_go_into_base(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "data")
    study = load_study(
        write(), ["train.learning_rate=9", "train.epochs=1", "data.test=test.jsonl", "model.dtype=float32"]
    )
    assert study.configs["all", "lora"].train.learning_rate == 9
    assert study.configs["all", "dora"].train.learning_rate == 2e-3  # the arm's own word is the last
    assert paths(study.configs["all", "dora"].data.test) == {"test": str(tmp_path / "data" / "test.jsonl")}
    assert (study.configs["all", "lora"].model.name, study.configs["all", "lora"].model.dtype) == (
        "tiny/model",
        "float32",
    )


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"reference": "lroa"}, r"study\.yaml: reference: 'lroa' is no arm\. Did you mean 'lora'\?"),
        ({"seads": [1]}, r"study\.yaml: seads: unknown key\. Did you mean 'seeds'\?"),
        ({"arms": None}, r"study\.yaml: arms: missing\. Name of an arm"),
        ({"arms": {}}, r"arms: expected at least one"),
        ({"arms": {"a/b": {}}}, r"arms: expected names made of letters.*not 'a/b'"),
        ({"arms": {"lora": {"output": "x"}}}, r"output is the study's to choose"),
        ({"arms": {"lora": {"trian": {}}}}, r"arm 'lora': trian: unknown key\. Did you mean 'train'\?"),
        (
            {"arms": {"lora": {"against": "dora"}}},
            r"arms: expected against to be another arm or null; 'lora' has \"dora\"",
        ),
        ({"arms": {"lora": {"train": {"epochs": -1}}}}, r"arm 'lora': train\.epochs: expected at least 0, got -1"),
        ({"tasks": {"t": {}, "u": {"data": {"form": "x"}}}}, r"arm 'lora' on task 'u': data\.form: expected"),
        ({"seeds": [1, 1]}, r"seeds: expected one or more, all different"),
        ({"seeds": [-1]}, r"seeds\.0: expected at least 0, got -1"),
        ({"seeds": [2**32]}, r"seeds\.0: expected less than 4294967296"),
        ({"seeds": 3}, r"seeds: expected a list, got 3"),
        ({"search": {"factors": [1.0, 0.0]}}, r"search\.factors\.1: expected more than 0, got 0"),
        ({"search": {"factors": [-1.0]}}, r"search\.factors\.0: expected more than 0, got -1"),
        ({"search": {"factors": [2.0], "seed": 0}}, r"search\.seed: 0 is among the study's seeds"),
        ({"search": {"seed": 9}}, r"search\.factors: missing\. Learning rates tried"),
        ({"search": {"factors": [2.0]}}, r"arm 'lora', search: data\.validation: missing"),
        ({"base": {"model": "m", "data": {"train": "t.jsonl"}}}, r"arm 'lora': data\.test: missing"),
        ({"means": {"m": ["tset"]}}, r"study\.yaml: means: 'm': 'tset' is no test set\. Did you mean 'test'\?"),
        ({"means": {"m": []}}, r"means\.m: expected one or more, all different"),
        ({"means": {"test": ["test"]}}, r"means: 'test' is the name of a test set; give the mean another"),
        (
            {"means": {"m": ["test", "u"]}, "tasks": {"t": {}, "u": {"data": {"test": {"u": "data/test.jsonl"}}}}},
            r"means: 'm': no task has all of test, u among its test sets",
        ),
    ],
)
def test_what_is_refused(write: Callable[..., Path], said: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_study(write(**said))


def shipped() -> list[Path]:
    """The files in ``studies`` that are for ``compare``; beside them lie those of other verbs, and runs."""
    return [
        file
        for file in sorted(STUDIES.rglob("*.yaml"))
        if {"arms", "base", "reference"} <= set(yaml.safe_load(file.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("file", shipped(), ids=lambda file: file.stem)
def test_shipped_studies_can_be_read(file: Path) -> None:
    study = load_study(file)
    assert len(study.said.seeds) >= 3
    first = next(iter(study.configs.values()))
    for config in study.configs.values():
        plan_of(config)
        # All else equal: arms differ in nothing but what a method is, or in the model where that is the question.
        assert config.data.model_copy(update={"columns": {}}) == first.data.model_copy(update={"columns": {}})
        assert config.model == first.model or file.stem.endswith("-models")
        same = (
            "batch_size",
            "gradient_accumulation",
            "schedule",
            "warmup",
            "weight_decay",
            "max_grad_norm",
            "precision",
        )
        assert all(getattr(config.train, key) == getattr(first.train, key) for key in same)
    assert len({config.train.epochs for config in study.configs.values()} - {0}) == 1  # 0: the model as it is
