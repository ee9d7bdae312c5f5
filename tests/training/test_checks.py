"""What is held against the model before a run: each check by itself, without any training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tiny_runs import Kept, rows, tiny_model, tiny_tokenizer, write_config, write_rows
from trimtab.config.read import load_config
from trimtab.config.resolve import Job
from trimtab.errors import ConfigError, DataError, ModelError
from trimtab.models.model_files import load_tokenizer
from trimtab.surgery.attach import attach
from trimtab.tasks import read_inputs
from trimtab.training.checks import check_before

POSITIONS = 48
LONG = "the crane is free again and no wind today " * 12
OPEN = [{"prompt": f"fog over berth {number}", "completion": f" watch {number}"} for number in range(8)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a table of ``POSITIONS``."""
    folder = tmp_path_factory.mktemp("models") / "table"
    tokenizer = tiny_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def check(tmp_path: Path, model_folder: Path) -> Callable[..., list[str]]:
    """The notes of a run over these rows."""

    def notes(found: list[Any], *, model: Path | dict[str, Any] | None = None, **sections: Any) -> list[str]:
        train = write_rows(tmp_path / "train.jsonl", found)
        said = model if isinstance(model, dict) else {"name": str(model or model_folder)}
        sections["data"] = {"choices": None, **sections.get("data", {})}
        job = Job.of(load_config(write_config(tmp_path / "run.yaml", model_folder, train, model=said, **sections)))
        listener = Kept()
        inputs = read_inputs(job.config, load_tokenizer(job.source), listener, job.max_length)
        model_ = tiny_model(job.embedding_rows) if job.positions.table is None else job._empty
        return [*listener.remarks, *check_before(job, inputs, attach(model_, job.plan))]

    return notes


def only(notes: list[str], word: str) -> str:
    """The one note that has ``word`` in it."""
    (found,) = [note for note in notes if word in note]
    return found


def file(tmp_path: Path, name: str, found: list[Any]) -> str:
    return str(write_rows(tmp_path / f"{name}.jsonl", found))


def test_an_ordinary_run_has_no_note(check: Callable[..., list[str]]) -> None:
    assert check(OPEN) == []


# Positions


def test_rows_are_cut_to_the_table_of_positions_and_told(check: Callable[..., list[str]], table: Path) -> None:
    plan = [{"match": ["*.c_attn", "*.c_fc"], "method": "lora", "rank": 2, "alpha": 4}]
    notes = check([*OPEN, {"prompt": LONG, "completion": " calm"}], model=table, plan=plan)
    said = "1 row cut to data.max_length = 48 tokens, as many as the model has positions"
    assert only(notes, "cut") == said


@pytest.mark.parametrize("length", [POSITIONS + 1, 1024])
def test_more_tokens_than_the_table_has_are_an_error(check: Callable[..., list[str]], table: Path, length: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.max_length: {length} tokens, .* table of 48 positions"):
        check(OPEN, model=table, data={"max_length": length})


def test_a_model_without_a_table_reads_rows_longer_than_it_was_made_for(check: Callable[..., list[str]]) -> None:
    notes = check([*OPEN, {"prompt": LONG * 3, "completion": " calm"}])
    assert "1 row to train on with more than the 256 tokens that the model was made for" in only(notes, "256")
    assert not any("cut to" in note for note in notes)


def test_new_tokens_without_room_for_a_prompt_are_an_error(check: Callable[..., list[str]], tmp_path: Path) -> None:
    test = {"t": file(tmp_path, "t", [{**row, "prompt": f"{row['prompt']}?"} for row in OPEN])}
    with pytest.raises(ConfigError, match=r"evaluation\.max_new_tokens: 1024 leaves no room .* 1024 positions"):
        check(OPEN, data={"test": test}, evaluation={"max_new_tokens": 1024})
    assert check(OPEN, data={"test": test}, evaluation={"max_new_tokens": 64}) == []
    assert check(OPEN, evaluation={"max_new_tokens": 1024}) == []  # nothing is written


def test_test_rows_that_are_cut_are_told(check: Callable[..., list[str]], tmp_path: Path) -> None:
    long, wide = {"prompt": LONG * 12, "completion": " calm"}, {"prompt": "fog", "completion": " a tug" * 900}
    test = {"t": file(tmp_path, "t", [*OPEN, long, wide])}
    notes = check(OPEN, data={"test": test}, evaluation={"max_new_tokens": 24})
    assert "1 row of the test set t cut: only the last 1000 tokens of a prompt" in only(notes, "1000")
    assert "left out of the loss of the test set t" in only(notes, "row 10")


# Tokens


def test_tokens_without_a_row_are_an_error_that_tells_how_to_make_one(
    check: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "short"
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[FILL]"})
    tokenizer.add_tokens(["<never used>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r'\[FILL\] \(token 341\); .* 341 rows.* model\.add_tokens: \["\[FILL\]"\]'):
        check(OPEN, model=folder)
    assert check(OPEN, model={"name": str(folder), "add_tokens": ["[FILL]"]}) == []


def test_a_token_that_nobody_writes_needs_no_row(check: Callable[..., list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "spare"
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    assert check(OPEN, model=folder) == []
    test = {"t": file(tmp_path, "t", [*OPEN, {"prompt": "<image> fog", "completion": " calm"}])}
    with pytest.raises(ModelError, match=r"<image> \(token 341\)"):
        check(OPEN, model=folder, data={"test": test})


def test_marks_of_a_template_that_are_no_tokens_are_told(check: Callable[..., list[str]], model_folder: Path) -> None:
    template = "{% for m in messages %}{{ '<|turn|>' + m.content + '<|eos|>' }}{% endfor %}"
    model = {"name": str(model_folder), "chat_template": template}
    shared = [
        {"conversations": [{"from": "human", "value": "fog?"}, {"from": "gpt", "value": f"calm {at}"}]}
        for at in range(6)
    ]
    for found in (rows(6, "chat"), shared):
        assert 'model.add_tokens: ["<|turn|>"]' in only(check(found, model=model), "<|turn|>")
    assert check(rows(6, "chat"), model={**model, "add_tokens": ["<|turn|>"]}) == []


# The schedule


def test_what_is_to_happen_after_the_end_of_the_run_is_told(check: Callable[..., list[str]], tmp_path: Path) -> None:
    validation = file(tmp_path, "v", OPEN)
    late = {"warmup": 200, "save_every": 30, "validate_every": 40, "learning_rate": 1e-3}
    notes = check(OPEN, train=late, data={"validation": validation})
    assert "200 steps of warmup, but the run has 2: the learning rate ends at 0.5 % of 0.001" in only(notes, "warmup")
    assert "no checkpoint before its end" in only(notes, "save_every")
    assert "validated once, at its end" in only(notes, "validate_every")
    notes = check(OPEN, train={"early_stopping": 5}, data={"validation": validation})
    assert "it cannot stop early" in only(notes, "early_stopping")


def test_validation_rows_that_are_all_too_long_are_an_error(check: Callable[..., list[str]], tmp_path: Path) -> None:
    long = {"prompt": "fog", "completion": " a tug" * 90}
    with pytest.raises(DataError, match=r"data\.validation: None of the 2 rows .*max_length"):
        check(OPEN, data={"validation": file(tmp_path, "v", [long] * 2), "max_length": 32})
    notes = check(OPEN, data={"validation": file(tmp_path, "v", [*OPEN, long]), "max_length": 32})
    assert "left out of the validation" in only(notes, "row 9")


# Settings that are known to hurt


@pytest.mark.parametrize(
    ("plan", "train", "word"),
    [
        ({"match": ["*.q_proj", "*.v_proj"], "method": "lora", "rank": 4, "alpha": 8}, {}, "only attention is adapted"),
        ({"match": "all-linear", "method": "dora", "rank": 4, "alpha": 256}, {}, "scales the update by 64; "),
        ({"match": "all-linear", "method": "lora", "rank": 16, "alpha": 1}, {}, "acts weaker by as much"),
        ({"match": "all-linear", "method": "lora", "rank": 4, "alpha": 8}, {"batch_size": 192}, "192 rows to a step"),
        ({"match": "all-linear", "method": "full"}, {"learning_rate": 5e-4}, "0.0005 is a rate of adapters"),
        (
            {"match": "all-linear", "method": "lora", "rank": 4, "alpha": 8},
            {"learning_rate": 2e-5},
            "of full fine-tuning",
        ),
        ({"match": "all-linear", "method": "mora", "rank": 4}, {"learning_rate": 5e-5}, "is low for mora"),
    ],
)
def test_a_setting_that_is_known_to_hurt_is_told_with_its_source(
    check: Callable[..., list[str]], plan: dict[str, Any], train: dict[str, Any], word: str
) -> None:
    (note,) = check(OPEN, plan=[plan], train={"learning_rate": 1e-3, **train})
    assert word in note
    assert "arXiv" in note or "thinkingmachines" in note or "studies/" in note


@pytest.mark.parametrize(
    ("plan", "train"),
    [
        ({"match": "all-linear", "method": "full"}, {"learning_rate": 2e-5, "batch_size": 256}),
        ({"match": "all-linear", "method": "lora"}, {"learning_rate": 5e-5, "b_learning_rate_ratio": 16.0}),
        ({"match": ["*_proj"], "method": "lora", "rank": 16, "alpha": 16, "rank_stabilised": True}, {}),
        ({"match": "all-linear", "method": "mora", "rank": 4}, {"gradient_accumulation": 32, "batch_size": 4}),
    ],
)
def test_usual_settings_are_not_talked_of(
    check: Callable[..., list[str]], plan: dict[str, Any], train: dict[str, Any]
) -> None:
    assert check(OPEN, plan=[plan], train={"learning_rate": 1e-3, **train}) == []
