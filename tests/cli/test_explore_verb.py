"""``trimtab explore`` from outside; runs are pretended, since what they do is tested elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_runs import cell_of, rows, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.files import read_json
from trimtab.runs.study_records import CellRecord


@pytest.fixture
def search_file(tmp_path: Path) -> Path:
    write_model(tmp_path / "tiny", num_hidden_layers=4)
    write_rows(tmp_path / "rows.jsonl", rows(12))
    base = {
        "model": "./tiny",
        "data": {"train": "rows.jsonl", "validation": 0.25, "test": "rows.jsonl"},
        "train": {"metric": "accuracy"},
    }
    said = {"base": base, "budget": "lora:6", "trials": 9}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    return tmp_path / "search.yaml"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plans with more MoRA are better; gives the names of the cells. A cell called ``stop`` in it is interrupted."""
    ran: list[str] = []

    def cell(config: Any, listener: Any, **_: Any) -> CellRecord:
        ran.append(config.output.name)
        listener.training_began(0, 2)
        lines = []
        for step in (1, 2):
            score = (step + sum(rule["method"] == "mora" for rule in config.plan)) / 6
            lines.append({"kind": "validation", "step": step, "loss": 1.0, "accuracy": score, "macro_f1": score})
            listener.step(step, 2)
            listener.metrics(lines[-1])
        closed = {"kind": "choice", "rows": 100, "choices": ["calm"], "confusion": [[100]]}
        tests = {name: {**closed, "accuracy": 0.5 + 0.01 * config.train.seed} for name in config.data.test}
        return cell_of(lines, tests)

    monkeypatch.setattr("trimtab.studies.plan_search.run_cell", cell)
    monkeypatch.setattr("trimtab.studies.confirm.run_cell", cell)
    return ran


@pytest.mark.full
def test_a_search_when_piped(cli: Callable[..., Any], search_file: Path, pretended: list[str]) -> None:
    result = cli("explore", search_file, "confirm=2", "prune=null")
    assert result.code == 0, result.err
    assert "\x1b" not in result.out + result.err
    folder = search_file.with_suffix("")
    for line in (
        "Plans of at most 11,136 trained parameters",
        "groups: outer attention (8 modules), outer mlp (6 modules), inner attention (8 modules), inner mlp (6 mod",
        "uniform lora of rank 6: 11,136 parameters",
        "Run 1 of 9: uniform lora 6 (11,136 parameters)",
        "accuracy 33.3 %,",
        "Run 9 of 9: ",
        "Confirming: mixed with seed 2",
        "best mixed minus best uniform, accuracy on rows, 2 new seeds: 0.0 points",
        f"best: {folder / 'best.yaml'} (also best_mixed.yaml, best_uniform.yaml)",
        f"train it: trimtab finetune {folder / 'best.yaml'}",
    ):
        assert line in result.out, line
    assert len(pretended) == 9 + 4
    found = read_json(folder / "explore.json")
    assert load_config(folder / "best.yaml").plan[0]["method"] == found["trials"][found["best"]]["parts"][0]["method"]
    assert (folder / "explore.html").is_file()


def test_ctrl_c_is_code_130(
    cli: Callable[..., Any], search_file: Path, pretended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.studies import plan_search

    cell = plan_search.run_cell

    def stop(config: Any, listener: Any, **how: Any) -> Any:
        if len(pretended) == 4:
            raise KeyboardInterrupt
        return cell(config, listener, **how)

    monkeypatch.setattr("trimtab.studies.explore.write_explore_page", lambda folder: None)
    monkeypatch.setattr(plan_search, "run_cell", stop)
    result = cli("explore", search_file)
    assert result.code == 130
    assert result.matches(r"interrupted; everything so far is in .*search\nGo on with: trimtab explore .*explore.yaml")
    assert read_json(search_file.with_suffix("") / "explore.json")["runs"] == 4
    monkeypatch.setattr(plan_search, "run_cell", cell)
    assert cli("explore", search_file.with_suffix("") / "explore.yaml").code == 0
    assert read_json(search_file.with_suffix("") / "explore.json")["runs"] == len(pretended) == 9


def test_a_mistake_is_one_line(cli: Callable[..., Any], search_file: Path) -> None:
    result = cli("explore", search_file, "base.data.validation=null")
    assert result.code == 1
    assert result.err.strip().count("\n") == 0
    assert result.matches("base.data.validation: is null")
    assert not search_file.with_suffix("").exists()
