"""A quantised run from outside: trained, evaluated, merged in three ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_runs import rows, write_config, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.files import read_json
from trimtab.runs.load import load_run
from trimtab.surgery.adapted import adapted_modules
from trimtab.training.run import finetune

pytestmark = pytest.mark.usefixtures("bare_runs")

IDS = torch.tensor([[5, 40, 60, 7, 80, 33]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished nf4 run; nothing changes it."""
    root = tmp_path_factory.mktemp("quantised")
    model = write_model(root / "tiny", num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    train, test = write_rows(root / "train.jsonl", rows(16)), write_rows(root / "test.jsonl", rows(6))
    yaml = write_config(root / "run.yaml", model, train, quantisation="nf4", data={"test": str(test)})
    return finetune(load_config(yaml)).path


def test_a_run_remembers_its_quantisation(run: Path) -> None:
    assert load_config(run / "config.yaml").quantisation == "nf4"
    assert read_json(run / "summary.json")["quantisation"] == "nf4"
    kinds = {type(module.handle).__module__ for _, module in adapted_modules(load_run(run).model)}
    assert kinds == {"trimtab.bases.nf4"}
    kinds = {type(module.handle).__module__ for _, module in adapted_modules(load_run(run, quantised=False).model)}
    assert kinds == {"trimtab.bases.linear"}
    # Two thirds of the parameters lie packed in bytes; counted is what they stand for.
    facts = read_json(run / "summary.json")
    bare = load_run(run, adapter=False, quantised=False).model
    assert facts["total_parameters"] == sum(parameter.numel() for parameter in bare.parameters())


def test_evaluating_again_gives_the_same(cli: Callable[..., Any], run: Path) -> None:
    before = read_json(run / "evaluation" / "test.after.json")
    result = cli("evaluate", run, "--out", "again")
    assert result.code == 0, result.err
    after = read_json(Path("again") / "evaluation" / "test.after.json")
    assert (after["accuracy"], after["perplexity"]) == (before["accuracy"], before["perplexity"])
    assert cli("generate", run, "Message: fog", "--max-new-tokens", "2").code == 0


def test_an_adapter_that_is_handed_over_says_beside_what_it_was_trained(cli: Callable[..., Any], run: Path) -> None:
    result = cli("export", run, "handed", "--to", "lora")
    assert result.code == 0, result.err
    for said in (result.out, (Path("handed") / "README.md").read_text()):
        assert "he run trained beside weights that are quantised (nf4)" in said


def test_merging_in_three_ways(cli: Callable[..., Any], run: Path) -> None:
    with torch.no_grad():
        adapted = load_run(run).model(IDS).logits
    errors = {}
    for onto in ("dequantised", "original", "requantised"):
        result = cli("merge", run, onto, "--onto", onto)
        assert result.code == 0, result.err
        assert f"merged onto the {onto} weights" in result.out
        said = re.search(r"logits differ by (\S+) of their norm", result.out)
        assert said is not None
        errors[onto] = float(said[1])
    assert "largest rounding of a merged weight to nf4" in result.out
    # Exact up to float32 rounding; the others are off by one quantisation of 4 bits and by a second one.
    assert errors["dequantised"] < 1e-5
    assert errors["original"] > 1e-2
    assert errors["requantised"] > 1e-2
    merged = AutoModelForCausalLM.from_pretrained("dequantised")
    assert "quantization_config" not in Path("dequantised/config.json").read_text()
    with torch.no_grad():
        assert float((merged(IDS).logits - adapted).norm() / adapted.norm()) < 1e-5
    assert "quantization_config" in Path("requantised/config.json").read_text()


def test_the_plan_names_the_quantisation(cli: Callable[..., Any], run: Path) -> None:
    result = cli("plan", run / "config.yaml")
    assert result.code == 0, result.err
    assert "quantisation: nf4" in result.out
    result = cli("plan", run / "config.yaml", "quantisation=nf5")
    assert result.code == 1
    assert result.matches("quantisation.*none.*int8.*nf4")


def test_nothing_to_quantise_again(cli: Callable[..., Any], make_yaml: Callable[..., Path]) -> None:
    plain = finetune(load_config(make_yaml(count=8))).path
    result = cli("merge", plain, "out", "--onto", "requantised")
    assert result.code == 1
    assert result.matches("not quantised")
    result = cli("merge", plain, "out")
    assert result.code == 0, result.err
    assert "merged against unmerged" in result.out
