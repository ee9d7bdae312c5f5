"""FinLoRA's file from the command line: one run of it, its folder, and its adapter in PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_runs import rows, write_rows
from trimtab.files import read_json
from trimtab.runs.load import load_run

pytestmark = pytest.mark.usefixtures("bare_runs")

IDS = torch.tensor([[5, 40, 60, 7, 80, 33], [9, 12, 300, 200, 4, 50]])
NAMES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def file(tmp_path: Path, model_folder: Path) -> Path:
    """A FinLoRA file in a folder of its own, with rows beside that."""
    folder = tmp_path / "lora"
    folder.mkdir()
    write_rows(tmp_path / "train.jsonl", rows(60, "finlora"))
    said = {"base_model": str(model_folder), "dataset_path": "../train.jsonl", "quant_bits": 32, "num_epochs": 1}
    runs = {
        "tiny_32bits_r4_dora": {**said, "lora_r": 4, "peft_use_dora": True, "learning_rate": 1e-2},
        "tiny_8bits_r8": {**said, "base_model": "meta-llama/Llama-3.1-8B-Instruct", "quant_bits": 8},
    }
    path = folder / "finetune_configs.json"
    path.write_text(json.dumps(runs))
    return path


def test_a_run_and_its_adapter_in_peft(cli: Any, file: Path, model_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    result = cli("finetune", "--finlora", file, "tiny_32bits_r4_dora", "train.max_steps=4")
    assert result.code == 0, result.err
    place = tmp_path / "lora_adapters" / "32bits_r4_dora" / "tiny_32bits_r4_dora"
    assert re.search(r"adapter \(\d[\d.]* kB\): lora_adapters/32bits_r4_dora/tiny_32bits_r4_dora/adapter", result.out)
    said = read_json(place / "adapter_config.json")
    assert (said["r"], said["lora_alpha"], said["use_dora"], said["lora_dropout"]) == (4, 16, True, 0.05)
    assert set(said["target_modules"]) == {"q_proj", "k_proj", "v_proj"}

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        before = base(IDS).logits
        theirs = PeftModel.from_pretrained(base, str(place))(IDS).logits
        ours = load_run(place).model(IDS).logits
    assert not torch.allclose(before, ours, atol=1e-3), "the adapter does something"
    # The same product in another order, float32, two blocks.
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)

    evaluated = cli("evaluate", place, "--data", write_rows(tmp_path / "test.jsonl", rows(9, "finlora")))
    assert evaluated.code == 0, evaluated.err
    again = cli("finetune", "--finlora", file, "tiny_32bits_r4_dora", "train.max_steps=2")
    assert again.code == 1
    assert "holds a run already" in again.err
    # A run that ends otherwise leaves no file of the old one behind.
    mora = "plan=[{match: '*.q_proj', method: mora, rank: 2}]"
    assert cli("finetune", "--finlora", file, "tiny_32bits_r4_dora", mora, "train.max_steps=1", "--overwrite").code == 0
    assert not any((place / name).exists() for name in NAMES)
    assert (place / "trimtab.json").is_file()


def test_links_become_copies_where_there_are_none(
    cli: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("links are not allowed here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    result = cli("finetune", "--finlora", file, "tiny_32bits_r4_dora", "train.max_steps=1", "output=there")
    assert result.code == 0, result.err
    for name in NAMES:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "there" / "adapter" / name).read_bytes()


def test_the_list_of_runs(cli: Any, file: Path) -> None:
    result = cli("finetune", "--finlora", file, "--list")
    assert result.code == 0, result.err
    assert re.search(r"tiny_32bits_r4_dora +32bits_r4_do", result.out)
    assert re.search(r"tiny_8bits_r8 +8bits_r8 .* 1 +2 x 4 +0\.0002", result.out)
    assert not (file.parents[1] / "lora_adapters").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--list"], 2, r"name it with --finlora FILE"),
        ([], 2, r"name the run's YAML file"),
        (["--finlora", "lora/finetune_configs.json"], 2, r"name a run of the file; see --list"),
        (["--finlora", "lora/finetune_configs.json", "tiny_8bits"], 1, r"no run 'tiny_8bits'\. Did you mean"),
        (["--finlora", "lora/finetune_config.json", "x"], 1, r"no such file\. Did you mean"),
    ],
)
def test_mistakes(cli: Any, file: Path, words: list[str], code: int, message: str) -> None:
    result = cli("finetune", *words)
    assert result.code == code
    assert result.matches(message), result.err


# --- tasks

SENTIMENT = ("negative", "neutral", "positive")


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    """A folder with two of FinLoRA's files."""
    folder = tmp_path / "data" / "test"
    folder.mkdir(parents=True)
    for name in ("fpb", "fiqa"):
        write_rows(folder / f"{name}_test.jsonl", rows(9, "finlora", SENTIMENT))
    return folder


def test_tasks_from_a_folder(cli: Any, model_folder: Path, tests: Path, tmp_path: Path) -> None:
    words = ("--task", "finlora/fpb", "--task", "finlora/fiqa", "--data", tests, "--limit", "6")
    result = cli("evaluate", model_folder, *words, "--generate", "--max-new-tokens", "2")
    assert result.code == 0, result.err
    assert re.search(r"unusable +\d", result.out)
    for name in ("fpb", "fiqa"):
        found = read_json(tmp_path / "runs" / "evaluate" / "evaluation" / f"{name}.before.json")
        assert (found["task"], found["rows"], found["choices"]) == (f"finlora/{name}", 6, list(SENTIMENT))
        assert found["answered_by"] == "generation"
        assert found["seconds"] > 0
        per_class = sum(entry["rows"] for entry in found["per_class"].values())
        assert per_class - sum(map(sum, found["confusion"])) == round(6 * found["unusable"])


def test_a_task_with_a_file_of_any_name(cli: Any, model_folder: Path, tmp_path: Path) -> None:
    mine = write_rows(tmp_path / "mine.jsonl", rows(9, "finlora", SENTIMENT))
    result = cli("evaluate", model_folder, "--task", "finlora/fpb", "--data", mine)
    assert result.code == 0, result.err
    assert re.search(r"^ ?fpb +value", result.out, re.MULTILINE)
    found = read_json(tmp_path / "runs" / "evaluate" / "evaluation" / "fpb.before.json")
    assert (found["answered_by"], found["rows"]) == ("likelihood", 9)
    assert {"accuracy", "macro_f1", "weighted_f1"} <= set(found)


def test_written_answers_of_any_closed_set(cli: Any, model_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows(15, "finlora"))
    result = cli("evaluate", model_folder, "--data", data, "--generate", "--max-new-tokens", "2", "--out", "here")
    assert result.code == 0, result.err
    found = read_json(tmp_path / "here" / "evaluation" / "rows.before.json")
    assert (found["kind"], found["choices"]) == ("choice", ["calm", "storm", "watch"])
    assert "unusable" in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "finlora/fbp"], r"no task 'finlora/fbp'\. Did you mean 'finlora/fpb'"),
        (["--task", "finlora/ner", "--data", "data/test"], r"finlora/ner: its rows, ner_test\.jsonl, are not among"),
        (["--task", "finlora/fpb"], r"none was named.*name the file, or the folder that holds it, with --data"),
        (["--task", "finlora/fpb", "--data", "data/test/fp.jsonl"], r"Did you mean fpb_test\.jsonl"),
    ],
)
def test_mistakes_with_tasks(cli: Any, model_folder: Path, tests: Path, words: list[str], message: str) -> None:
    result = cli("evaluate", model_folder, *words)
    assert result.code == 1
    assert result.matches(message), result.err
