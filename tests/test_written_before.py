"""What an earlier version wrote is read, and means the same: a run, an interrupted run, and two adapters.

tests/data/before holds, made by the version of commit afa3260:

model/          a random Llama of two blocks with its tokenizer        train.jsonl, test.jsonl    the rows
run/            a finished run of 12 steps (DoRA and LoRA) with evaluations before and after, metrics and a report
interrupted/    the same run, interrupted by Ctrl-C at step 6 of 12
adapters/peft   a DoRA adapter in PEFT's layout                        adapters/native    a MoRA adapter in ours
logits.safetensors    ``ids``, and the logits that the model gave for them: ``base``, ``run``, ``peft``, ``native``
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trimtab
from run_fixtures import own_cache
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.errors import RunError
from trimtab.files import read_json, read_jsonl

__all__ = ["own_cache"]

BEFORE = Path(__file__).parent / "data" / "before"
# Float32 sums over at most 48 numbers, on another processor in another order.
TOLERANCE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
TIMED = {"seconds", "tokens_per_second", "memory_gib"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(BEFORE, tmp_path / "before", symlinks=True))


@pytest.fixture
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BEFORE / "model").eval()


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(BEFORE / "logits.safetensors")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def config_of(folder: Path, name: str) -> RunConfig:
    return load_config(folder / name / "config.yaml", [f"output={folder / name}"])


@pytest.mark.parametrize(
    ("name", "place"), [("run", "run/adapter"), ("peft", "adapters/peft"), ("native", "adapters/native")]
)
def test_an_adapter_gives_the_logits_that_it_gave(
    model: Any, expected: dict[str, torch.Tensor], name: str, place: str
) -> None:
    torch.testing.assert_close(logits(model, expected["ids"]), expected["base"], **TOLERANCE)
    trimtab.load_adapter(model, BEFORE / place)
    torch.testing.assert_close(logits(model, expected["ids"]), expected[name], **TOLERANCE)
    assert float((expected[name] - expected["base"]).abs().max()) > 0.1  # or the adapter could have been left off


def test_a_run_is_loaded_with_its_adapter(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    from trimtab.runs.load import load_run

    run = load_run(folder / "run")
    torch.testing.assert_close(logits(run.model, expected["ids"]), expected["run"], **TOLERANCE)
    assert run.folder.read_summary().best_step == 6


def test_a_run_is_evaluated_to_the_same_figures(folder: Path) -> None:
    from trimtab.assessing import measure

    where, results = measure(str(folder / "run"), [], listener=None)
    assert where == folder / "run"
    was = read_json(BEFORE / "run" / "evaluation" / "harbour.after.json")
    now = read_json(folder / "run" / "evaluation" / "harbour.after.json")
    assert list(now) == [*was, "model", "adapter", "source"]
    assert now == results[0].plain()
    for key in was.keys() - {"seconds", "perplexity"}:
        assert now[key] == was[key], key
    assert now["perplexity"] == pytest.approx(was["perplexity"], rel=1e-4)
    lines = [list(read_jsonl(at / "run" / "predictions" / "harbour.after.jsonl")) for at in (BEFORE, folder)]
    for before, after in zip(*lines, strict=True):
        assert list(after) == list(before)
        assert {**after, "scores": None} == {**before, "scores": None}
        assert after["scores"] == pytest.approx(before["scores"], abs=1e-4)


def test_its_page_is_written_again(folder: Path) -> None:
    from trimtab.reports.run.run_page import write_run_page

    page = folder / "run" / "report.html"
    page.unlink()
    write_run_page(folder / "run")
    text = page.read_text("utf-8")
    result = read_json(BEFORE / "run" / "evaluation" / "harbour.after.json")
    assert "harbour" in text
    assert f"{100 * result['accuracy']:.1f}" in text


def test_an_interrupted_run_goes_on_to_what_the_whole_run_came_to(
    folder: Path, expected: dict[str, torch.Tensor]
) -> None:
    from trimtab.runs.load import load_run
    from trimtab.training.run import finetune

    done = finetune(config_of(folder, "interrupted"), resume=True)
    summary, whole = read_json(done.summary), read_json(BEFORE / "run" / "summary.json")
    summary = {key: value for key, value in summary.items() if key in whole}  # later versions say more
    assert list(summary) == list(whole)
    timed = {"created", "training_seconds", "total_seconds", "peak_memory_gib", "machine", "versions"}
    timed |= {"model", "adapter_bytes"}  # the adapter names the model by its path
    assert {key: summary[key] for key in summary.keys() - timed} == {key: whole[key] for key in whole.keys() - timed}
    assert read_json(done.plan) == read_json(BEFORE / "run" / "plan.json")
    lines = [list(read_jsonl(file)) for file in (BEFORE / "run" / "metrics.jsonl", done.metrics)]
    for before, after in zip(*lines, strict=True):
        assert list(after) == list(before)
        figures = before.keys() - TIMED - {"kind"}
        assert {key: after[key] for key in figures} == pytest.approx({key: before[key] for key in figures}, rel=1e-3)
    torch.testing.assert_close(
        logits(load_run(done.path).model, expected["ids"]), expected["run"], rtol=1e-3, atol=1e-3
    )


def test_a_finished_run_is_not_resumed_nor_written_over(folder: Path) -> None:
    from trimtab.training.run import finetune

    with pytest.raises(RunError, match="this run is finished; there is nothing to resume"):
        finetune(config_of(folder, "run"), resume=True)
    with pytest.raises(RunError, match=r"holds a run already \(finished\)"):
        finetune(config_of(folder, "run"))
    changed = load_config(folder / "interrupted" / "config.yaml", [f"output={folder / 'interrupted'}", "train.seed=1"])
    with pytest.raises(RunError, match=r"began with other settings: train.seed was 0, now 1"):
        finetune(changed, resume=True)
