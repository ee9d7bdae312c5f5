"""``trimtab combine`` from outside: runs and folders, what is written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab
from tiny_runs import tiny_tokenizer, write_model
from trimtab.errors import AdapterError
from trimtab.export._combined import Ingredient
from trimtab.models.locate import Source
from trimtab.runs.load import load_run, with_tokens_of

LORA = [{"match": "all-linear", "method": "lora", "rank": 4, "alpha": 8}]
DORA = [{"match": "*.q_proj", "method": "dora", "rank": 2}]
IDS = torch.tensor([[5, 40, 60, 7, 80, 33], [9, 12, 300, 200, 4, 50]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.fixture
def runs(trained: Callable[..., Path]) -> tuple[Path, Path]:
    return trained("lora", LORA), trained("dora", DORA)


def test_runs_of_lora_and_dora_become_a_dora_that_peft_loads(cli: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = cli("combine", f"{runs[0]}:0.7", f"{runs[1]}:-0.4", "--out", tmp_path / "both")
    assert result.code == 0, result
    assert "combined 2 adapters on 14 modules" in result.out
    assert "exact to rounding: relative error" in result.out
    model = load_run(runs[0], adapter=False).model
    trimtab.load_adapter(model, runs[0] / "adapter", "one")
    trimtab.load_adapter(model, runs[1] / "adapter", "two")
    trimtab.combine(model, {"one": 0.7, "two": -0.4}, name="both")
    wanted = logits(model)
    base = AutoModelForCausalLM.from_pretrained(load_run(runs[0]).config.model.name)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "both")), wanted)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "both")) == len(load_run(runs[0]).reader)
    report = json.loads((tmp_path / "both" / "combination.json").read_text())
    assert report["of"] == {"lora": 0.7, "dora": -0.4}
    assert report["error"] < 1e-5, "rounding, beside a change that is small"
    assert "weight -0.4" in (tmp_path / "both" / "README.md").read_text()
    # The folders of the adapters will do, and so does what was combined.
    folders = [f"{runs[0] / 'adapter'}:0.7", f"{runs[1] / 'adapter'}:-0.4"]
    assert cli("combine", *folders, "--out", tmp_path / "again").code == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()
    report = json.loads((tmp_path / "again" / "combination.json").read_text())
    assert report["of"] == {"lora/adapter": 0.7, "dora/adapter": -0.4}, "two folders of one name are told apart"
    more = cli(
        "combine", tmp_path / "both", f"{runs[1]}:0.5", "--out", tmp_path / "both", "--overwrite", "--how", "svd"
    )
    assert more.code == 0, more
    assert "lora of rank 8" in more.out


def test_refusals(cli: Any, runs: tuple[Path, Path], trained: Callable[..., Path], tmp_path: Path) -> None:
    one, two = runs
    mora = trained("mora", [{"match": "*.q_proj", "method": "mora", "rank": 2}])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    cases = [
        ([f"{one}:much", str(two)], [], "'much' is no number"),
        ([f"{one}:1", f"{one}:2"], [], "named twice"),
        ([str(tmp_path / "none"), str(two)], [], "no such folder"),
        ([str(one), str(two)], ["--density", "0.5"], "density means nothing to how='linear'"),
        ([str(one), str(mora)], [], "a sum of lora and mora"),
        ([str(one), str(two)], ["--out", tmp_path / "mine", "--overwrite"], "other than a combined adapter"),
    ]
    for adapters, more, said in cases:
        result = cli("combine", *adapters, "--out", tmp_path / "out", *more)
        assert result.code == 1, result
        assert said in result.err
        assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_adapters_of_different_models_are_not_combined(cli: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name, base in (("a", "owner/one"), ("b", "owner/two"), ("c", None)):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).write_bytes((runs[0] / "adapter" / file).read_bytes())
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    result = cli("combine", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert result.code == 1
    assert "different models" in result.err
    result = cli("combine", tmp_path / "c", "--out", tmp_path / "out")
    assert result.code == 1
    assert "--model MODEL" in result.err
    model = load_run(runs[0], adapter=False).config.model.name
    result = cli("combine", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out", "--model", model)
    assert result.code == 0, result


def test_tokens_of_one_number_are_of_one_word(tmp_path: Path) -> None:
    """Two runs that add tokens of their own would each read the other's rows of the embedding as theirs."""
    base = Source("tiny", "folder", str(write_model(tmp_path / "tiny")))
    adapter = tmp_path / "adapter"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    assert with_tokens_of(adapter, replace(base, add_tokens=("<one>",))).add_tokens == ("<one>", "<two>")
    for others in (("<two>",), ("<three>",)):
        with pytest.raises(AdapterError, match=r"the token .<(one|two)>. under the number"):
            with_tokens_of(adapter, replace(base, add_tokens=others))


def test_a_weight_stands_behind_the_last_colon(tmp_path: Path) -> None:
    assert Ingredient.read("runs/fr:0.7") == Ingredient("runs/fr", 0.7)
    assert Ingredient.read("runs/fr") == Ingredient("runs/fr", 1.0)
    assert Ingredient.read("C:/runs/fr:-2e-1") == Ingredient("C:/runs/fr", -0.2)
    (tmp_path / "a:0.5").mkdir()
    assert Ingredient.read(str(tmp_path / "a:0.5")).weight == 1.0
