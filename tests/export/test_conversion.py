"""``trimtab convert``, and the formats that hold nothing but LoRA, for runs of other methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trimtab.runs.load import load_run

MIX = [
    {"match": "all-linear", "method": "dora", "rank": 2},
    {"match": "*.v_proj", "method": "mora", "rank": 2},
    {"match": "*.down_proj", "method": "full"},
    {"match": "model.norm", "method": "full"},
]
IDS = torch.tensor([[5, 40, 60, 7, 80, 33], [9, 12, 300, 200, 4, 50]])
RATE = {"train": {"learning_rate": 5e-3}}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def in_peft(run: Path, out: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(load_run(run).config.model.name)
    return logits(PeftModel.from_pretrained(base, out))


def test_a_mix_of_methods_becomes_lora_that_peft_loads(cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained("mix", MIX, **RATE)
    rows = Path(load_run(run).config.data.test["kind"][0].path)
    wanted = logits(load_run(run).model)
    off = []
    asked = {"plain": ["--rank", 4], "weighed": ["--rank", 4, "--rows", rows], "all": ["--rank", 64]}
    for name, more in asked.items():
        result = cli(
            "convert", run, tmp_path / name, "--to", "lora", *(more if name == "all" else ["--rank", 4, *more])
        )
        assert result.code == 0, result
        off.append(float((in_peft(run, tmp_path / name) - wanted).norm() / wanted.norm()))
        assert "14 modules (dora, full, mora) to plain LoRA of rank" in result.out
        assert "1 modules are no LoRA" in result.out
        assert "model.norm" in result.out
        assert ("weighed by 6 rows" in result.out) == (name == "weighed")
    assert off[2] < 1e-5 < off[1]
    report = json.loads((tmp_path / "weighed" / "conversion.json").read_text())
    assert len(report["modules"]) == 14
    assert 0 < report["output_error"] < 1
    config = json.loads((tmp_path / "weighed" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["modules_to_save"]) == (4, {}, ["model.norm"])


def test_an_error_chooses_ranks(cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained("mix", MIX, **RATE)
    result = cli("convert", run, tmp_path / "a", "--to", "lora", "--error", "0.2")
    assert result.code == 0, result
    report = json.loads((tmp_path / "a" / "conversion.json").read_text())
    ranks = {one["rank"] for one in report["modules"].values()}
    assert len(ranks) > 1
    assert max(one["error"] for one in report["modules"].values()) <= 0.2
    assert f"ranks {min(ranks)} to {max(ranks)}, by module" in result.out
    result = cli("convert", run, tmp_path / "b", "--to", "lora", "--error", "0.01", "--rank", "3")
    assert "modules miss the error of 0.01 at the highest rank that --rank allows" in result.out + result.err


def test_plain_lora_is_kept_unless_it_has_more_ranks(cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained("lora", [{"match": "all-linear", "method": "lora", "rank": 4, "alpha": 8}])
    assert cli("convert", run, tmp_path / "same", "--to", "lora").code == 0
    assert not (tmp_path / "same" / "conversion.json").exists()
    torch.testing.assert_close(in_peft(run, tmp_path / "same"), logits(load_run(run).model))
    assert cli("convert", run, tmp_path / "less", "--to", "lora", "--rank", 2).code == 0
    assert json.loads((tmp_path / "less" / "adapter_config.json").read_text())["r"] == 2


def test_refusals_say_what_to_do_and_leave_nothing(cli: Any, trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained("blocks", [{"match": "*.mlp", "method": "parallel", "bottleneck": 2}])
    result = cli("convert", run, tmp_path / "out", "--to", "lora")
    assert result.code == 1
    assert "sits on a block" in result.err
    run = trained("mix", MIX, **RATE)
    result = cli("convert", run, tmp_path / "out", "--to", "lora", "--error", "2")
    assert result.code == 1
    assert "between 0 and 1" in result.err
    result = cli("convert", run, tmp_path / "out", "--to", "lora", "--rows", tmp_path / "none.jsonl")
    assert result.code == 1
    assert "none.jsonl" in result.err
    assert not (tmp_path / "out").exists()
    assert cli("convert", run, tmp_path / "out", "--to", "gguf").code == 2
