"""Studies whose arms are of several tasks, and searches for a plan of a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_encoders import write_encoder
from tiny_runs import rows, write_rows
from trimtab.config.search import load_explore
from trimtab.files import read_json
from trimtab.reports.study.comparison import findings, study_tables
from trimtab.reports.study.study_page import write_study_page
from trimtab.studies.compare import compare
from trimtab.studies.explore import explore
from trimtab.studies.study_cells import load_study
from trimtab.studies.study_results import write_results

pytestmark = pytest.mark.usefixtures("here", "bare_runs")
TRAIN: dict[str, Any] = {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-2, "precision": "float32"}
BY_A_HEAD = {"task": "sequence_classification", "data": {"columns": {"text": "prompt", "label": "completion"}}}


@pytest.mark.full
def test_a_head_and_the_likelihood_of_answers_are_compared_by_accuracy(tmp_path: Path, model_folder: Path) -> None:
    for name, count in (("train", 24), ("test", 12)):
        write_rows(tmp_path / f"{name}.jsonl", rows(count))
    encoder = write_encoder(tmp_path / "encoder")
    study = {
        "base": {
            "model": str(model_folder),
            "data": {"train": "train.jsonl", "test": {"harbour": "test.jsonl"}, "validation": None},
            "plan": [{"match": "all-linear", "method": "lora", "rank": 2}],
            "train": TRAIN,
            "evaluation": {"before": False},
        },
        "arms": {
            "by likelihood": {"task": "causal_lm"},
            "with a head": BY_A_HEAD,
            "an encoder": {**BY_A_HEAD, "model": str(encoder)},
        },
        "reference": "by likelihood",
        "seeds": [0],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    loaded = load_study(tmp_path / "study.yaml")
    assert compare(loaded) == []
    results = write_results(loaded)
    assert {line.arm: line.measure for line in results.summary} == dict.fromkeys(study["arms"], "accuracy")
    page = write_study_page(loaded.folder).read_text("utf-8")
    for arm in study["arms"]:
        assert arm in page
    assert findings(results)
    assert study_tables(results)


@pytest.mark.full
def test_a_plan_of_a_classifier_is_searched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("train", 24), ("validation", 9), ("test", 9)):
        write_rows(tmp_path / f"{name}.jsonl", rows(count))
    data = {name: f"{name}.jsonl" for name in ("train", "validation", "test")} | BY_A_HEAD["data"]
    run = {
        "model": str(write_encoder(tmp_path / "encoder", num_hidden_layers=3)),
        "task": "sequence_classification",
        "data": data,
        "train": {**TRAIN, "metric": "accuracy", "validate_every": 1},
        "evaluation": {"before": False},
    }
    said = {"base": run, "budget": "lora:4", "trials": 3, "output": str(tmp_path / "out"), "confirm": 0}
    (tmp_path / "explore.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    folder = explore(load_explore(tmp_path / "explore.yaml", []))
    trials = read_json(folder / "explore.json")["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 3
