"""The pattern study on a tiny model: its cells, what they keep, and what they say together."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from transformers import AutoModelForCausalLM

import trimtab
from pattern_page import pattern_table, verdict, write_pattern_page
from pattern_pictures import PAPER, with_interval
from pattern_results import VIEWS, mean_correlation, summarise, write_results
from pattern_study import AS_SET, PatternCell, load_pattern_study, run_cells
from run_fixtures import two_blocks as model_folder
from source_paths import paths
from tiny_runs import rows, write_rows
from trimtab.errors import ConfigError, Interrupted, PlanError, RunError
from trimtab.files import read_json
from trimtab.runs.events import Listener
from trimtab.runs.folder import RunFolder
from trimtab.runs.lock import locked
from trimtab.studies import cell as cell_module
from trimtab.training.run import finetune

__all__ = ["model_folder"]

ROOT = Path(__file__).resolve().parents[3]


def arm(method: str, learning_rate: float, **options: Any) -> dict[str, Any]:
    plan = [{"match": ["*.q_proj", "*.v_proj"], "method": method, **options}]
    return {"plan": plan, "train": {"learning_rate": learning_rate}}


@pytest.fixture
def study(tmp_path: Path, model_folder: Path) -> Callable[..., Path]:
    """Write a study of four steps, two checkpoints and two seeds; keywords replace its keys."""

    def make(**changes: Any) -> Path:
        write_rows(tmp_path / "rows.jsonl", rows(24))
        said: dict[str, Any] = {
            "base": {
                "model": str(model_folder),
                "data": {"train": "rows.jsonl", "validation": None},
                "train": {"max_steps": 4, "batch_size": 4, "precision": "float32", "save_every": 2, "log_every": 1},
            },
            "arms": {"full": arm("full", 1e-3), "dora": arm("dora", 1e-2, rank=2)},
            "seeds": [0, 1],
            "levels": {
                "slow magnitudes": {"dora": {"train": {"magnitude_learning_rate": 1e-3}}},
                "the same": {"full": {"train": {"learning_rate": 1e-3}}},
            },
            "output": "out",
            **changes,
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
        return tmp_path / "study.yaml"

    return make


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, bare_runs: None) -> list[Any]:
    """Runs happen in this process, which is quicker, and are noted."""
    done: list[Any] = []

    def here(config: Any, listener: Listener) -> None:
        done.append(config)
        finetune(config, resume=RunFolder(config.output).status is not None, listener=listener)

    monkeypatch.setattr(cell_module, "run_apart", here)
    return done


def results(cells: Sequence[PatternCell]) -> list[tuple[PatternCell, dict[str, Any]]]:
    return list(run_cells(cells, Listener(), []))


def test_the_cells_of_a_study(study: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load_pattern_study(study(), ["train.max_steps=6"])
    cells = loaded.cells
    assert [(cell.level, cell.arm, cell.seed) for cell in cells] == [
        (AS_SET, "full", 0),
        (AS_SET, "dora", 0),
        (AS_SET, "full", 1),
        (AS_SET, "dora", 1),
        ("slow magnitudes", "dora", 0),
        ("slow magnitudes", "dora", 1),
        ("the same", "full", 0),
        ("the same", "full", 1),
    ]
    config = cells[5].config
    assert config.plan == ({"match": ["*.q_proj", "*.v_proj"], "method": "dora", "rank": 2},)
    assert (config.train.seed, config.train.max_steps, config.train.learning_rate) == (1, 6, 1e-2)
    assert config.train.magnitude_learning_rate == 1e-3
    assert paths(config.data.train) == (str(tmp_path / "rows.jsonl"),)
    assert loaded.folder == tmp_path / "out"
    assert all(cell.config.output.parent == tmp_path / "out" / "cells" for cell in cells)
    # What is the same run is one cell.
    assert len({cell.config.output for cell in cells}) == 6
    assert cells[0].config == cells[6].config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sedes": [1]}, "sedes: unknown key. Did you mean 'seeds'?"),
        ({"seeds": [0, 0]}, "expected different seeds"),
        ({"levels": {"slow": {"lora": {}}}}, r"levels.slow: 'lora' is none of the arms \(full, dora\)"),
        ({"levels": {AS_SET: {"dora": {}}}}, "choose another name"),
        ({"arms": {"full": {"train": {"lerning_rate": 1}}}}, "arm 'full', as set: train.lerning_rate: unknown key"),
        ({"arms": {"full": {"plan": {"method": "full"}}}}, "arm 'full', as set: plan: expected a list of rules"),
        ({"arms": {}}, "arms"),
    ],
    ids=str,
)
def test_a_wrong_study_is_refused_before_anything_runs(
    study: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_pattern_study(study(**{"levels": {}, **changes}))


def test_a_plan_that_cannot_be_is_refused_before_anything_runs(study: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.0"):
        load_pattern_study(study(arms={"full": arm("full", 1e-3, rank=3)}, levels={}))
    with pytest.raises(ConfigError, match="no such file"):
        load_pattern_study(tmp_path / "none.yaml")


@pytest.mark.full
def test_nothing_is_run_twice(study: Callable[..., Path], runs: list[Any], tmp_path: Path) -> None:
    """Cut off after two cells of six and in the middle of the third."""
    cells = load_pattern_study(study()).cells

    class Stops(Listener):
        steps = 0

        def step(self, step: int, steps: int) -> None:
            self.steps += 1
            if self.steps == 11:
                raise KeyboardInterrupt

    with pytest.raises((Interrupted, KeyboardInterrupt)):
        list(run_cells(cells, Stops(), []))
    assert len(runs) == 3
    kept = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("cell.json"))
    assert len(kept) == 2
    found = results(cells)
    assert len(runs) == 3 + 4  # the third goes on, and three more; two levels share their cells with the arms
    assert len(found) == 8
    assert results(cells) == found
    assert len(runs) == 7
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"cell.json"}


def test_a_cell_keeps_what_analysis_says_of_each_checkpoint(
    study: Callable[..., Path], runs: list[Any], tmp_path: Path, model_folder: Path
) -> None:
    cells = load_pattern_study(study()).cells
    ((_, found),) = results([cells[1]])
    measured = found["measured"]
    assert [change[:3] for change in measured["changes"]] == [
        [kind, block, step] for step in (2, 4) for block in (0, 1) for kind in ("q_proj", "v_proj")
    ]
    # The same run by itself: its last state is the adapter.
    run = finetune(cells[1].config.model_copy(update={"output": tmp_path / "alone"}))
    losses = [row.loss for row in run.read_metrics()]
    assert (measured["first_loss"], measured["last_loss"]) == (losses[0], losses[3])  # a quarter of four lines
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trimtab.load_adapter(model, run.adapter)
    for kind, block, _, norm, magnitude, direction in measured["changes"][4:]:
        name = f"model.layers.{block}.self_attn.{kind}"
        change = trimtab.weight_change(before[f"{name}.weight"], trimtab.effective_weight(model, name))
        assert norm == pytest.approx(float(before[f"{name}.weight"].norm(dim=1).square().mean().sqrt()), rel=1e-6)
        assert magnitude == pytest.approx(change.delta_magnitude, rel=1e-4)  # the weight is made in float32 here
        assert direction == pytest.approx(change.delta_direction, rel=1e-3)


def made(seeds: int = 3) -> list[tuple[PatternCell, dict[str, Any]]]:
    """Results of three arms with made-up changes: four blocks, two checkpoints, two kinds."""
    draw = np.random.default_rng(0)
    found = []
    for arm in ("full", "lora", "dora"):
        for seed in range(seeds):
            changes = [
                [kind, block, step, 2.0 + block, draw.uniform(1, 2) * step, draw.uniform(1, 2) * step + block]
                for step in (10, 20)
                for block in range(4)
                for kind in ("q_proj", "v_proj")
            ]
            cell: Any = PatternCell(AS_SET, arm, seed, None)  # type: ignore[arg-type]
            told = {"trainable_parameters": 5, "steps": 20, "training_seconds": 1.0, "total_seconds": 2.0}
            told |= {"peak_memory_gib": 0.5, "precision": "float32", "machine": {}, "versions": {}}
            found.append((cell, {**told, "measured": {"first_loss": 2.0, "last_loss": 1.0, "changes": changes}}))
    return found


def test_correlations_are_those_of_numpy_in_each_view() -> None:
    found = made()
    lines = summarise(found)["correlations"]
    assert len(lines) == 3 * 3 * len(VIEWS)  # arms, kinds and together, views
    by_key = {(line["arm"], line["kind"], line["view"]): line for line in lines}
    for cell, result in found:
        table = [row for row in result["measured"]["changes"] if row[0] == "v_proj"]
        changes = np.array([row[4:] for row in table]).reshape(2, 4, 2)  # step, block, (dM, dD)
        norms = np.array([row[3] for row in table]).reshape(2, 4)
        wanted = {
            "all": changes,
            "layers": changes - changes.mean(1, keepdims=True),
            "time": changes - changes.mean(0, keepdims=True),
            "relative": np.stack([changes[..., 0] / norms, changes[..., 1]], axis=2),
            "ranks": np.stack([stats.rankdata(changes[..., which]) for which in (0, 1)], axis=1),
            "size": np.stack([1 / norms[1] ** 2, changes[1, :, 1]], axis=1),
        }
        assert wanted.keys() == VIEWS.keys()
        for view, cloud in wanted.items():
            line = by_key[cell.arm, "v_proj", view]
            want = np.corrcoef(cloud.reshape(-1, 2).T)[0, 1]
            assert line["per_seed"][cell.seed] == pytest.approx(want, rel=1e-10)
            assert line["low"] < line["mean"] < line["high"]
    first = summarise(found)["changes"][0]
    there = [row[4:] for _, one in found[:3] for row in one["measured"]["changes"] if row[:3:2] == ["q_proj", 10]]
    assert first["weights"] == len(there) == 12
    assert [first["delta_magnitude"], first["delta_direction"]] == pytest.approx(np.mean(there, axis=0))


def test_the_interval_is_a_t_interval_of_fishers_z() -> None:
    values = [0.8, 0.9, 0.7]
    z = [math.atanh(value) for value in values]
    low, high = stats.ttest_1samp(z, 0).confidence_interval(0.95)
    found = mean_correlation(values)
    assert found == pytest.approx({"mean": math.tanh(sum(z) / 3), "low": math.tanh(low), "high": math.tanh(high)})
    # By hand: t of 2 degrees of freedom at 97.5 % is 4.3027.
    spread = math.sqrt(sum((value - sum(z) / 3) ** 2 for value in z) / 2 / 3)
    assert found["low"] == pytest.approx(math.tanh(sum(z) / 3 - 4.30265 * spread), abs=1e-5)
    assert mean_correlation([1.0, 1.0]) == pytest.approx({"mean": 1, "low": 1, "high": 1})
    assert mean_correlation([0.5]) == {"mean": pytest.approx(0.5), "low": None, "high": None}
    assert mean_correlation([]) == {"mean": None, "low": None, "high": None}


def test_the_verdict_goes_no_further_than_its_interval() -> None:
    def said(arm: str, mean: float, low: float | None, high: float | None) -> dict[str, Any]:
        return {"arm": arm, "mean": mean, "low": low, "high": high}

    assert verdict(said("lora", 0.5, 0.2, 0.7)) == "the paper's sign"
    assert verdict(said("full", 0.5, 0.2, 0.7)) == "the other sign"
    assert verdict(said("dora", -0.5, -0.7, 0.1)) == "undecided: 0 is inside"
    assert verdict(said("mora", -0.5, -0.7, -0.1)) == "negative"
    assert verdict(said("lora", 0.5, None, None)) == "one seed: no interval"
    assert with_interval(said("lora", 0.5, 0.2, 0.7)) == "+0.50 [+0.20, +0.70]"


@pytest.mark.full
@pytest.mark.parametrize("seeds", [pytest.param(1, marks=pytest.mark.full), 3])
def test_the_page_is_whole(study: Callable[..., Path], tmp_path: Path, seeds: int) -> None:
    loaded = load_pattern_study(study())
    found = made(seeds)
    changed = [(PatternCell("slower", cell.arm, cell.seed, cell.config), result) for cell, result in found[: 2 * seeds]]
    others = deepcopy(changed[:seeds])
    for place, (cell, result) in enumerate(others):
        others[place] = PatternCell("other matrices", cell.arm, cell.seed, cell.config), result
        for change in result["measured"]["changes"]:
            change[0] = {"q_proj": "k_proj", "v_proj": "o_proj"}[change[0]]
    write_results(loaded, found + changed + others)
    page = write_pattern_page(tmp_path / "out").read_text(encoding="utf-8")
    for name in ("pattern", "pattern-views", "pattern-sizes", "pattern-levels-all", "pattern-levels-layers"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "out" / f"{name}.svg").read_text(encoding="utf-8")
    assert page.count('<figure class="picture" tabindex="0"><svg') == 5
    assert "://" not in page
    for words in ("q_proj", "v_proj", "o_proj", "together", "slower", "-0.62", "over time", "slow magnitudes", *PAPER):
        assert words in page
    with (tmp_path / "out" / "pattern.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 16 * (3 + 2 + 1) * seeds
    assert float(lines[3]["delta_direction"]) == found[0][1]["measured"]["changes"][3][5]
    assert pattern_table(read_json(tmp_path / "out" / "pattern.json")).row_count == 3 * (3 + 2 + 1)


@pytest.mark.full
def test_the_program_runs_and_goes_on(
    study: Callable[..., Path], runs: list[Any], capsys: pytest.CaptureFixture[str], program: Any
) -> None:
    main = program("pattern")
    file = study(arms={"lora": arm("lora", 1e-2, rank=2)}, levels={}, seeds=[0])
    for _ in range(2):
        assert main([str(file)]) == 0
        said = capsys.readouterr().out
        assert "Cell 1 of 1: lora, as set, seed 0" in said
        assert "pattern.html" in said
        assert len(runs) == 1
    assert main([str(file), "train.sede=1"]) == 1
    assert "unknown key" in capsys.readouterr().err
    assert main([]) == 2


def test_two_at_one_study_are_refused(
    study: Callable[..., Path], runs: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, program: Any
) -> None:
    main = program("pattern")
    with locked(tmp_path / "out" / "cells" / ".lock"):
        assert main([str(study())]) == 1
    assert re.search(r"another process .* is at work here", capsys.readouterr().err)
    assert runs == []


@pytest.mark.full
def test_a_failed_run_is_told_and_the_others_go_on(
    study: Callable[..., Path],
    runs: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    program: Any,
) -> None:
    here = cell_module.run_apart

    def run(config: Any, listener: Listener) -> None:
        if config.plan[0]["method"] == "full":
            raise RunError("training has diverged")
        here(config, listener)

    monkeypatch.setattr(cell_module, "run_apart", run)
    main = program("pattern")
    assert main([str(study(levels={}, seeds=[0]))]) == 1
    assert "full, as set, seed 0: training has diverged" in capsys.readouterr().err
    assert {row["arm"] for row in read_json(tmp_path / "out" / "pattern.json")["cells"]} == {"dora"}
    assert (tmp_path / "out" / "pattern.html").is_file()


@pytest.mark.full
def test_the_program_says_how_to_go_on_when_it_is_stopped(
    study: Callable[..., Path],
    runs: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    program: Any,
) -> None:
    here = cell_module.run_apart

    def run(config: Any, listener: Listener) -> None:
        if runs:
            raise Interrupted("interrupted")
        here(config, listener)

    monkeypatch.setattr(cell_module, "run_apart", run)
    main = program("pattern")
    assert main([str(study())]) == 130
    assert "Go on with the same command" in capsys.readouterr().err
    assert "1 runs" in (tmp_path / "out" / "pattern.html").read_text(encoding="utf-8")


def test_the_shipped_study_is_three_methods_from_one_start() -> None:
    if not (ROOT.parent / "shared" / "data" / "finance").is_dir():
        pytest.skip("../shared/data, the finance rows, is not here")
    study = load_pattern_study(ROOT / "studies" / "pattern" / "study.yaml")
    assert set(study.said.arms) == set(PAPER)
    assert len(study.said.seeds) >= 3
    first = [cell.config for cell in study.cells if cell.level == AS_SET]
    assert all(config.data == first[0].data and config.model == first[0].model for config in first)
    assert {config.train.max_steps for config in first} == {first[0].train.max_steps}
