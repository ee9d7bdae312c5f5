"""Every verb on a run whose adapter sits on blocks, with LoRA inside them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from run_fixtures import two_blocks as model_folder
from tiny_runs import rows, write_config, write_rows
from trimtab.config.read import load_config
from trimtab.files import read_json, write_json
from trimtab.training.run import finetune

__all__ = ["model_folder"]
pytestmark = pytest.mark.usefixtures("bare_runs")

PLAN = [
    {"match": ["*.self_attn", "*.mlp"], "method": "serial", "bottleneck": 4},
    {"match": "*.mlp", "layers": 1, "method": "parallel", "bottleneck": 4},
    {"match": "*.q_proj", "method": "lora", "rank": 2},
]


def write(root: Path, model_folder: Path, name: str, **train: Any) -> Path:
    """The YAML of a run of PLAN with a test set."""
    test = {"one": str(write_rows(root / "one.jsonl", rows(9)))}
    train_file = write_rows(root / "train.jsonl", rows(24))
    return write_config(
        root / f"{name}.yaml", model_folder, train_file, plan=PLAN, data={"test": test}, train={"epochs": 2, **train}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return finetune(load_config(write(tmp_path_factory.mktemp("runs"), model_folder, "run"))).path


def test_plan(cli: Any, model_folder: Path, tmp_path: Path) -> None:
    yaml = write(tmp_path, model_folder, "run")
    found = json.loads(cli("plan", yaml, "--json").out)
    assert {module["module"]: module["method"] for module in found["modules"]} == {
        **{f"model.layers.{block}.self_attn": "serial" for block in (0, 1)},
        **{f"model.layers.{block}.self_attn.q_proj": "lora" for block in (0, 1)},
        "model.layers.0.mlp": "serial",
        "model.layers.1.mlp": "parallel",
    }
    block = 2 * 4 * 32 + 4 + 32
    assert found["trainable_parameters"] == 4 * block + 2 * 2 * (32 + 32)
    table = cli("plan", yaml, "--modules").out
    assert re.search(r"model\.layers\.1\.mlp\s+parallel\s+2\s+32 x 32\s+292", table)


def test_it_learns_and_is_the_same_again(cli: Any, run: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    before = read_json(run / "evaluation" / "one.after.json")
    result = cli("evaluate", run)
    assert result.code == 0, result.err
    again = read_json(run / "evaluation" / "one.after.json")
    assert again["accuracy"] == before["accuracy"]
    assert again["perplexity"] == pytest.approx(before["perplexity"], rel=1e-6)


def test_an_interrupted_run_goes_on(cli: Any, model_folder: Path, tmp_path: Path) -> None:
    """Cut off after a checkpoint: the resumed run ends where the whole one did."""
    yaml = write(tmp_path, model_folder, "cut", save_every=3)
    folder = finetune(load_config(yaml)).path
    whole = load_file(folder / "adapter" / "trimtab_adapter.safetensors")
    shutil.rmtree(folder / "adapter")
    write_json(folder / "summary.json", {**read_json(folder / "summary.json"), "status": "interrupted"})
    steps = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(steps) > 1
    shutil.rmtree(steps[-1])
    result = cli("finetune", folder / "config.yaml", "--resume")
    assert result.code == 0, result.err
    again = load_file(folder / "adapter" / "trimtab_adapter.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


def test_generate(cli: Any, run: Path) -> None:
    result = cli("generate", run, "Message: fog over berth seven wind\nAnswer:")
    assert result.code == 0, result.err
    assert result.out.strip()


def test_merge_says_why_not(cli: Any, run: Path, tmp_path: Path) -> None:
    result = cli("merge", run, "merged")
    assert result.code == 1
    assert result.matches(r"4 adapters sit on blocks, such as model\.layers\.0\.self_attn \(method serial\)")
    assert result.matches(r"keep the adapter .* or train with a method that changes weights \(dora, full, lora, mora\)")
    assert not (tmp_path / "merged").exists()


def test_analyze_leaves_them_out(cli: Any, run: Path, model_folder: Path, tmp_path: Path) -> None:
    result = cli("analyze", model_folder, run, "--out", "found")
    assert result.code == 0, result.err
    assert "4 adapters on blocks, such as model.layers.0.self_attn, change no weight and are left out" in result.out
    changes = read_json(tmp_path / "found" / "changes.json")["changes"]
    assert {one["method"] for one in changes} == {"lora"}


def test_a_block_of_no_such_name(cli: Any, make_yaml: Callable[..., Path]) -> None:
    result = cli("plan", make_yaml(plan=[{"match": "all-linear", "method": "serial"}]))
    assert result.code == 1
    assert result.matches(
        r"Method serial sits on blocks, such as '\*\.mlp' or '\*\.self_attn', and not on linear layers"
    )
