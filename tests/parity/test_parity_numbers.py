"""The same start, the same steps, the same numbers as PEFT, and both ways through a folder: benchmarks/parity.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parity
import trimtab
from parity import KINDS, VARIANTS, Report
from trimtab.surgery.adapted import adapted_modules

# float32 has an epsilon of 1.2e-7, and these models are three blocks of sums over 32 to 48 numbers in a row: seen were
# at most 5e-7 in outputs and 4e-6 in gradients, whose sums run over more numbers that cancel.
OUTPUTS, GRADIENTS = 2e-6, 2e-5
# Each side trains alone, and AdamW divides a gradient by its size, also where it is next to nothing: seen were 7e-5.
TRAINED = 5e-4
STEPS = 5

TINY = ("llama", "gpt2", "bert")


@pytest.fixture(scope="module", params=[(kind, variant) for kind in TINY for variant in VARIANTS], ids=": ".join)
def report(request: pytest.FixtureRequest) -> Report:
    kind, variant = request.param
    return parity.compare(kind, variant, STEPS)


def test_before_training(report: Report) -> None:
    assert report.outputs_before < OUTPUTS
    assert report.gradients_before < GRADIENTS


def test_after_training(report: Report) -> None:
    assert report.moved > 0.005  # the training did something that could have differed
    assert report.outputs_after < 2 * OUTPUTS
    assert report.gradients_after < TRAINED
    assert report.tensors_after < TRAINED


def test_both_directions_of_loading(report: Report) -> None:
    assert report.ours_in_peft < OUTPUTS
    assert report.peft_in_ours < OUTPUTS


def test_merged(report: Report) -> None:
    assert report.merged < 2 * OUTPUTS


@pytest.mark.parametrize("variant", ["lora rs patterns", "dora patterns"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_float64_nothing_is_left(kind: str, variant: str) -> None:
    """So what float32 leaves is rounding, and the formulas are the same. Seen were at most 5e-13, in tensors."""
    report = parity.compare(kind, variant, STEPS, torch.float64)
    assert report.moved > 0.005
    for column in parity.COLUMNS:
        assert column == "moved" or getattr(report, column) < 1e-11, column


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_comparison_sees_a_difference(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a percent in one tensor on one side alone must show, or all of the above says nothing."""
    start = parity.start

    def skewed(ours: nn.Module, theirs: nn.Module) -> None:
        start(ours, theirs)
        with torch.no_grad():
            next(value for name, value in parity.our_tensors(ours).items() if name.endswith("1.mlp.up_proj.B")).mul_(
                1.005
            )

    monkeypatch.setattr(parity, "start", skewed)
    report = parity.compare("llama", variant, steps=1)
    assert report.outputs_before > OUTPUTS
    assert report.gradients_before > GRADIENTS
    assert report.tensors_after > TRAINED
    assert report.merged > 2 * OUTPUTS


@pytest.mark.parametrize("kind", TINY)
def test_the_variants_are_what_they_say(kind: str) -> None:
    """Several ranks and scales, other ones in one block than in the next."""
    model = parity.make_model(kind)
    trimtab.attach(model, parity.rules(kind, "lora rs patterns"))
    options: list[Any] = [module.adapter.options for _, module in adapted_modules(model)]
    assert {(one.rank, one.alpha) for one in options} == {(4, 6), (2, 6), (4, 3), (6, 2.5)}
    assert {type(module.base).__name__ for _, module in adapted_modules(model)} == (
        {"Conv1D"} if kind == "gpt2" else {"Linear"}
    )


def test_the_program_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "parity.json"
    words = ["parity.py", "--model", "gpt2", "--variant", "dora", "--steps", "1", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", words)
    parity.main()
    assert "gpt2" in capsys.readouterr().out
    (row,) = json.loads(target.read_text(encoding="utf-8"))
    assert (row["model"], row["variant"], row["steps"]) == ("gpt2", "dora", 1)
    assert {key for key in row if key not in ("model", "variant", "dtype", "steps")} == set(parity.COLUMNS)
    assert set(KINDS) >= {"llama", "gpt2", "smollm2-135m"}
