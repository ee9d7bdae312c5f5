"""``trimtab compare`` from outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_runs import rows, write_rows
from trimtab.errors import Interrupted, RunError
from trimtab.files import read_json
from trimtab.studies import compare as comparing
from trimtab.studies.cell import run_cell
from trimtab.studies.process import run_here

pytestmark = pytest.mark.usefixtures("bare_runs")

LORA = {"match": "all-linear", "method": "lora", "rank": 2, "alpha": 4}


@pytest.fixture
def study(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of two arms and one seed, whose cells run in this process."""
    monkeypatch.setattr("trimtab.studies.cell.run_apart", run_here)
    write_rows(tmp_path / "train.jsonl", rows(24))
    write_rows(tmp_path / "test.jsonl", rows(12))
    said = {
        "base": {
            "model": str(model_folder),
            "data": {"train": "train.jsonl", "test": {"harbour": "test.jsonl"}, "validation": None},
            "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "precision": "float32"},
            "evaluation": {"before": False},
        },
        "arms": {"lora": {"plan": [LORA]}, "dora": {"plan": [{**LORA, "method": "dora"}]}},
        "reference": "lora",
        "seeds": [0],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    return tmp_path / "study.yaml"


@pytest.mark.full
def test_a_study_from_plan_to_page(cli: Any, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = cli("compare", study, "--plan")
    assert planned.code == 0, planned.err
    assert re.search(r"all +dora +0 +0\.01 +–", planned.out)
    assert not (study.parent / "study").exists()  # nothing was run or written

    result = cli("compare", study)
    assert result.code == 0, result.err
    assert "\x1b" not in result.out
    for line in (
        r"\[1/2\] lora, seed 0: harbour accuracy \d+\.\d %, \d+\.\d s, \d\.\d\d GiB",
        r"\[2/2\] dora, seed 0, about \d",
        r"harbour, 12 rows",
        r"dora +\S+ k +\d+\.\d +\S+ \(.* to .*\) +\d\.\d+ +\d+\.\d s +\d\.\d\d GiB",
        r"harbour: .* dora ",
        r"page: .*/study/results\.html",
    ):
        assert re.search(line, result.out), line
    assert (study.parent / "study" / "results.html").is_file()

    monkeypatch.setattr("trimtab.studies.cell.run_apart", None)  # whatever would run now fails
    again = cli("compare", study)
    assert (again.code, "[1/" in again.out) == (0, False)
    page = study.parent / "study" / "results.html"
    page.unlink()
    assert cli("compare", study, "--page-only").code == 0
    assert page.is_file()
    assert re.search(r"all +dora +0 +0\.01 +harbour accuracy", cli("compare", study, "--dry-run").out)


@pytest.mark.full
def test_one_arm_with_a_setting_into_another_folder(cli: Any, study: Path, tmp_path: Path) -> None:
    result = cli("compare", study, "train.max_steps=1", "--only", "dora", "--out", "there")
    assert result.code == 0, result.err
    results = read_json(tmp_path / "there" / "results.json")
    assert [(run["arm"], run["steps"]) for run in results["runs"]] == [("dora", 1)]
    assert results["said"]["base"]["train"]["max_steps"] == 1


def test_a_failed_run_is_told_at_the_end(cli: Any, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(config: Any, *arguments: Any, **how: Any) -> Any:
        if config.plan[0]["method"] == "lora":
            raise RunError("the run's process was killed")
        return run_cell(config, *arguments, **how)

    monkeypatch.setattr(comparing, "run_cell", fails)
    result = cli("compare", study)
    assert result.code == 1
    assert result.matches(r"1 of the study's runs failed; .*\n  lora, seed 0: the run's process was killed\n")
    assert "[2/2] dora, seed 0: harbour accuracy" in result.out
    assert "not done: 1 of the runs, of lora" in result.out
    assert "Traceback" not in result.err


def test_an_interrupted_study_keeps_what_is_done(cli: Any, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(config: Any, *arguments: Any, **how: Any) -> Any:
        if config.plan[0]["method"] == "dora":
            raise Interrupted("stopped")
        return run_cell(config, *arguments, **how)

    monkeypatch.setattr(comparing, "run_cell", stops)
    result = cli("compare", study)
    assert result.code == 130
    assert result.matches(r"interrupted; every run that is done is kept\. The same command goes on")
    assert [run["arm"] for run in read_json(study.parent / "study" / "results.json")["runs"]] == ["lora"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--only", "lroa"], 2, r"--only: 'lroa' is not in this study; it has lora, dora"),
        (["--task", "x"], 2, r"--task: 'x' is not in this study"),
        (["--plan", "--page-only"], 2, r"--plan writes nothing"),
        (["train.epoch=1"], 1, r"arm 'lora': train\.epoch: unknown key\. Did you mean 'train\.epochs'|'epochs'"),
    ],
)
def test_mistakes(cli: Any, study: Path, words: list[str], code: int, said: str) -> None:
    result = cli("compare", study, *words)
    assert result.code == code
    assert re.search(said, re.sub(r"[\s│]+", " ", result.err)), result.err


def test_a_study_that_is_not_there(cli: Any, study: Path) -> None:
    result = cli("compare", study.with_name("sudy.yaml"))
    assert result.code == 1
    assert result.matches(r"sudy\.yaml: no such file\. Did you mean 'study\.yaml'\?")
