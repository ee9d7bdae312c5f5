"""Whole runs: what they write, every form of rows, every method, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from run_fixtures import two_blocks as model_folder
from tiny_runs import Kept, rows, tiny_tokenizer, write_rows
from trimtab.assessing import measure
from trimtab.config.read import load_config
from trimtab.errors import ConfigError, DataError, ModelError, RunError
from trimtab.files import read_json, read_jsonl
from trimtab.runs.load import load_run
from trimtab.tasks import Head, read_inputs
from trimtab.training.run import finetune

__all__ = ["model_folder"]
ALL = {"match": "all-linear", "rank": 4}
METHODS: dict[str, list[dict[str, Any]]] = {
    "lora": [{**ALL, "method": "lora", "alpha": 8}],
    "dora": [{**ALL, "method": "dora", "alpha": 8, "dropout": 0.05}],
    "mora by rotation": [{**ALL, "method": "mora", "form": "rotation"}],
    "mora by sharing": [{**ALL, "method": "mora", "form": "sharing"}],
    "mora with magnitude": [{**ALL, "method": "mora", "magnitude": True}],
    "full": [{"match": "all-linear", "method": "full"}],
    "a mix": [
        {**ALL, "method": "lora"},
        {"match": "*.v_proj", "method": "mora", "rank": 4},
        {"match": "*.down_proj", "layers": "1", "method": "full"},
    ],
}
IDS = torch.tensor([[5, 40, 60, 7, 80, 33], [9, 12, 300, 200, 4, 50]])


def test_the_run_folder(make_config: Callable[..., Any], tmp_path: Path, model_folder: Path) -> None:
    from peft import PeftModel

    test = write_rows(tmp_path / "harbour.jsonl", rows(9))
    config = make_config(
        count=40, data={"validation": 0.2, "test": str(test)}, train={"epochs": 2, "tensorboard": True, "log_every": 5}
    )
    folder = finetune(config)
    files = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert files >= {
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "evaluation/harbour.before.json",
        "evaluation/harbour.after.json",
        "predictions/harbour.before.jsonl",
        "predictions/harbour.after.jsonl",
        "checkpoints/checkpoint-16/trainer_state.json",
    }
    assert any("events" in file for file in files if file.startswith("tensorboard/"))
    assert load_config(folder.config) == config

    plan = read_json(folder.plan)
    assert plan["trainable_parameters"] == sum(module["parameters"] for module in plan["modules"])
    assert len(plan["modules"]) == 14

    lines = list(read_jsonl(folder.metrics))
    assert [(row["kind"], row["step"]) for row in lines] == [
        ("train", 1),
        ("train", 5),
        ("validation", 8),
        ("train", 10),
        ("train", 15),
        ("train", 16),
        ("validation", 16),
    ]
    seconds = [row["seconds"] for row in lines]
    assert seconds == sorted(seconds)
    assert lines[0].keys() == {
        *("kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds", "memory_gib")
    }
    assert lines[2].keys() == {"kind", "step", "epoch", "loss", "accuracy", "macro_f1", "seconds"}

    summary = read_json(folder.summary)
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["epochs"], summary["best_step"]) == (16, 2.0, summary["best_step"])
    assert (summary["train_rows"], summary["validation_rows"], summary["form"]) == (32, 8, "completion")
    assert summary["choices"] == ["calm", "storm", "watch"]
    assert summary["precision"] == "float32"
    assert summary["adapter_bytes"] == sum(file.stat().st_size for file in folder.adapter.iterdir())
    assert summary["trainable_parameters"] == plan["trainable_parameters"]
    assert 0 < summary["training_seconds"] < summary["total_seconds"]
    assert 0.05 < summary["peak_memory_gib"] < 16
    assert summary["train_tokens"] > 32 * 5
    assert {"trimtab", "torch", "transformers"} <= summary["versions"].keys()

    ours = load_run(folder.path)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder.adapter)
    bare = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        expected = theirs(IDS).logits
        found = ours.model(IDS).logits
        assert (expected - bare(IDS).logits).abs().max() > 0.1  # it learned something
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    result = read_json(folder.evaluation("harbour", "after"))
    again = measure(str(folder.path), [])[1][0].plain()
    assert {key: again[key] for key in ("accuracy", "confusion", "rows")} == {
        key: result[key] for key in ("accuracy", "confusion", "rows")
    }


@pytest.mark.usefixtures("bare_runs")
def test_validation_from_a_file(make_config: Callable[..., Any], tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", rows(7))
    folder = finetune(make_config(data={"validation": str(held)}))
    summary = folder.read_summary()
    assert (summary.train_rows, summary.validation_rows, summary.best_step) == (24, 7, 6)


def test_fewer_rows_are_the_same_ones_whatever_the_seed(make_config: Callable[..., Any]) -> None:
    tokenizer, told = tiny_tokenizer(), Kept()
    data = {"train_limit": 9, "validation": 0.34}
    found = [read_inputs(make_config(data=data, train={"seed": seed}), tokenizer, told) for seed in (0, 1)]
    held = [[row.number for row in one.validation] for one in found]
    drawn = [
        sorted([*(number for _, number in one.rows.origins), *part]) for one, part in zip(found, held, strict=True)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == len(set(drawn[0])) == 9
    assert {number % 3 for number in drawn[0]} == {0, 1, 2}  # of every answer
    assert len(found[0].validation) == 3
    assert "9 of them drawn: data.train_limit" in told.notes
    assert len(read_inputs(make_config(data={"train_limit": 99}), tokenizer, told).rows) == 24


@pytest.mark.usefixtures("bare_runs")
@pytest.mark.parametrize("form", ["finlora", "completion", "alpaca", "chat", "text", "multiple_choice"])
def test_every_form_of_rows(make_config: Callable[..., Any], tmp_path: Path, form: str) -> None:
    test = write_rows(tmp_path / "test.jsonl", rows(6, form))
    config = make_config(form=form, data={"test": str(test), "validation": 0.25}, train={"max_steps": 2})
    listener = Kept()
    folder = finetune(config, listener=listener)
    kind = read_json(folder.evaluation("test", "after"))["kind"]
    assert kind == {"text": "perplexity", "multiple_choice": "multiple_choice"}.get(form, "choice")
    assert any(f"'{form}'" in note for note in listener.notes)
    assert len(listener.column("loss")) == 2
    assert folder.read_summary().status == "finished"


@pytest.mark.usefixtures("bare_runs")
def test_open_answers_are_generated(make_config: Callable[..., Any], tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", rows(6, "open"))
    config = make_config(
        form="open",
        data={"test": str(test), "validation": 0.25},
        train={"max_steps": 2},
        evaluation={"max_new_tokens": 4, "limit": 4},
    )
    folder = finetune(config)
    result = read_json(folder.evaluation("test", "after"))
    assert (result["kind"], result["rows"]) == ("generation", 4)
    validation = [row for row in read_jsonl(folder.metrics) if row["kind"] == "validation"]
    assert validation[0].keys() == {"kind", "step", "epoch", "loss", "seconds"}
    # Measured again as in the run, though the answers of these rows alone could pass for anything.
    assert measure(str(folder.path), [])[1][0].rows == 4


@pytest.mark.usefixtures("bare_runs")
def test_the_validation_loss_is_that_of_the_rows(make_config: Callable[..., Any], tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", rows(5, "text"))
    folder = finetune(make_config(form="text", data={"validation": str(held)}, train={"max_steps": 3}))
    loaded = load_run(folder.path)
    total = count = 0.0
    for row in rows(5, "text"):  # one row at a time, with the model's own loss
        ids = torch.tensor([[*loaded.reader(row["text"]).input_ids, loaded.reader.eos_token_id]])
        with torch.no_grad():
            total += float(loaded.model(ids, labels=ids).loss) * (ids.numel() - 1)
        count += ids.numel() - 1
    found = next(row["loss"] for row in read_jsonl(folder.metrics) if row["kind"] == "validation")
    assert found == pytest.approx(total / count, rel=1e-5)


@pytest.mark.usefixtures("bare_runs")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(make_config: Callable[..., Any], method: str) -> None:
    listener = Kept()
    # One and the same batch four times: its loss must fall at every step after the first, whose rate is the peak.
    config = make_config(
        count=4, plan=METHODS[method], train={"epochs": 4, "warmup": 0, "schedule": "constant", "learning_rate": 5e-3}
    )
    folder = finetune(config, listener=listener)
    assert listener.column("loss") == sorted(listener.column("loss"), reverse=True)
    assert listener.column("loss")[-1] < 0.95 * listener.column("loss")[0]
    with torch.no_grad():
        assert load_run(folder.path).model(IDS).logits.isfinite().all()


@pytest.mark.usefixtures("bare_runs")
def test_bfloat16_and_float32(make_config: Callable[..., Any]) -> None:
    losses = {}
    for precision in ("bfloat16", "float32"):
        listener = Kept()
        folder = finetune(make_config(precision, train={"precision": precision, "max_steps": 3}), listener=listener)
        assert folder.read_summary().precision == precision
        assert load_run(folder.path).model.dtype == getattr(torch, precision)
        losses[precision] = listener.column("loss")
    # bfloat16 has 8 bits of mantissa: losses agree to a few percent, and never to the last digit.
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]


@pytest.mark.usefixtures("bare_runs")
def test_a_run_that_diverges(make_config: Callable[..., Any]) -> None:
    # full: an adapter of bounded direction would only get large.
    plan = [{"match": "all-linear", "method": "full"}]
    config = make_config(plan=plan, train={"learning_rate": 1e30, "epochs": 4, "warmup": 0, "save_every": 1})
    with pytest.raises(RunError, match=r"diverged.*Lower train\.learning_rate"):
        finetune(config)
    summary = read_json(config.output / "summary.json")
    assert summary["status"] == "diverged"
    assert summary["steps"] >= 1
    assert (config.output / "report.html").is_file()
    for line in (config.output / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    lower = ["train.learning_rate=1e-4", "train.epochs=1"]  # as its page says to begin again
    assert finetune(load_config(config.output / "config.yaml", lower), overwrite=True).status == "finished"


@pytest.mark.full
def test_a_model_too_large_for_the_memory(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    folder = finetune(config)
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "0.00001")
    with pytest.raises(ModelError, match=r"Training .* needs about .*free.*TRIMTAB_MEMORY_GIB"):
        finetune(config, overwrite=True)
    assert folder.read_summary().status == "finished"  # the old run is untouched
    with pytest.raises(ModelError, match=r"Loading .* needs about"):
        load_run(folder.path)


def test_answers_outside_the_choices_are_found_before_anything_is_loaded(
    make_config: Callable[..., Any], tmp_path: Path
) -> None:
    test = write_rows(tmp_path / "test.jsonl", [*rows(4), {"prompt": "Message: fog\nAnswer: ", "completion": "gale"}])
    config = make_config(data={"test": str(test)})
    with pytest.raises(DataError, match=r"test\.jsonl, row 5: has the answer 'gale'.*calm, storm, watch"):
        finetune(config)
    assert not config.output.exists()
    with pytest.raises(DataError, match=r"row 2: has the answer 'watch'"):
        finetune(make_config(data={"choices": ["calm", "storm"]}))


@pytest.mark.usefixtures("bare_runs")
def test_choices_that_no_training_row_has_are_noted(make_config: Callable[..., Any]) -> None:
    listener = Kept()
    config = make_config(data={"choices": ["calm", "watch", "storm", "gale"]}, train={"max_steps": 1})
    finetune(config, listener=listener)
    assert any("no training row has the answer gale" in remark for remark in listener.remarks)


def test_a_metric_that_the_rows_do_not_have(make_config: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"train\.metric: accuracy .* open; choose loss"):
        finetune(make_config(form="open", data={"validation": 0.2}, train={"metric": "accuracy"}))


def test_rows_with_choices_of_their_own(make_config: Callable[..., Any], tmp_path: Path) -> None:
    """They are learnt, validated and tested by the accuracy over the choices of each row."""
    test = write_rows(tmp_path / "test.jsonl", rows(9, "multiple_choice"))
    config = make_config(
        form="multiple_choice", data={"test": str(test), "validation": 0.25}, train={"epochs": 6, "validate_every": 12}
    )
    listener = Kept()
    folder = finetune(config, listener=listener)
    assert "each row brings its own answers to choose from" in listener.notes
    before, after = (read_json(folder.evaluation("test", stage)) for stage in ("before", "after"))
    assert after["chance"] == pytest.approx(1 / 3)
    assert after["perplexity"] < before["perplexity"] / 2
    validation = [row for row in read_jsonl(folder.metrics) if row["kind"] == "validation"]
    assert validation[0].keys() == {"kind", "step", "epoch", "loss", "accuracy", "seconds"}
    best = max(validation, key=lambda row: (row["accuracy"], -row["loss"]))
    assert folder.read_summary().best_step == best["step"]
    again = measure(str(folder.path), [])[1][0].plain()
    assert (again["kind"], again["accuracy"]) == ("multiple_choice", after["accuracy"])
    assert "guessing would give 33.3 %" in folder.report.read_text()


def test_settings_that_contradict_choices_of_their_own(make_config: Callable[..., Any]) -> None:
    for sections, words in (
        ({"data": {"choices": ["calm", "watch"]}}, r"data\.choices: these rows bring their own choices"),
        ({"data": {"choices": None}}, r"data\.choices: .* leave it at auto"),
        ({"data": {"validation": 0.2}, "train": {"metric": "macro_f1"}}, r"macro_f1 .* each row brings its own"),
    ):
        with pytest.raises(ConfigError, match=words):
            finetune(make_config(form="multiple_choice", **sections))


def test_rows_that_are_left_out_are_named(make_config: Callable[..., Any]) -> None:
    length = sorted(len(tiny_tokenizer()(row["text"]).input_ids) for row in rows(24, "text"))[12]
    listener = Kept()
    config = make_config(form="text", data={"max_length": length}, train={"max_steps": 1})
    folder = finetune(config, listener=listener)
    assert any(f"rows cut to data.max_length = {length}" in remark for remark in listener.remarks)
    assert folder.read_summary().notes == listener.remarks
    assert f"rows cut to data.max_length = {length}" in folder.report.read_text()
    with pytest.raises(DataError, match=r"None of the 24 rows has a token to train on .*row 1"):
        finetune(make_config("short", data={"max_length": 2}))


@pytest.mark.usefixtures("bare_runs")
def test_the_head_of_a_trained_model_is_taken_apart(make_config: Callable[..., Any]) -> None:
    folder = finetune(make_config(train={"max_steps": 1}))
    assert Head(load_run(folder.path).model).sparse
