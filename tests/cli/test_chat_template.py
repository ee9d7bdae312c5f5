"""``model.chat_template``: a template of a run's own, from its YAML to its adapter, the merged folder and an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from command_line import Result
from run_fixtures import make_bare
from tiny_runs import rows, tiny_model, tiny_tokenizer, write_rows

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"


def test_a_template_of_the_run_s_own(
    make_yaml: Callable[..., Path], cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bare(monkeypatch, page=True)
    base = tmp_path / "base"
    tokenizer = tiny_tokenizer(None)
    tiny_model(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "own.jinja").write_text(TEMPLATE + ASK)
    train = write_rows(tmp_path / "chat.jsonl", rows(8, "chat"))
    yaml = make_yaml(
        model={"name": str(base), "chat_template": "own.jinja"},
        data={"train": str(train), "choices": None, "test": {"harbour": str(train)}},
        train={"max_steps": 2, "warmup": 50},
        evaluation={"before": False, "max_new_tokens": 4},
    )

    told = cli("plan", str(yaml))
    assert "note: train.warmup: 50 steps of warmup" in told.out
    planned = json.loads(cli("plan", str(yaml), "--json").out)["notes"]
    planned = [note for note in planned if not note.startswith("train.compile")]  # a short run does not tell

    run = tmp_path / "run"
    done = cli("finetune", str(yaml))
    assert done.code == 0, done.err
    assert "<|im_start|>user: " in done.out
    assert "note: train.warmup: 50 steps" in done.err
    kept = json.loads((run / "summary.json").read_text())["notes"]
    assert planned == kept[: len(planned)]
    assert "50 steps of warmup" in (run / "report.html").read_text()

    (tmp_path / "own.jinja").unlink()
    assert (run / "adapter" / "chat_template.jinja").read_text() == TEMPLATE + ASK
    answer = cli("generate", str(run), "is the tide high", "--max-new-tokens", "3")
    assert answer.code == 0, answer.err
    merged = tmp_path / "merged"
    assert cli("merge", str(run), str(merged)).code == 0
    again = AutoTokenizer.from_pretrained(merged)
    assert (again.chat_template, again.eos_token) == (TEMPLATE + ASK, "<|im_end|>")
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == [0, 3]

    beside = cli("evaluate", str(base), "--adapter", str(run / "adapter"), "--data", str(train), "--out", str(tmp_path))
    assert beside.code == 0, beside.err


def test_a_template_that_is_no_jinja_is_told_by_its_line(
    make_yaml: Callable[..., Path], cli: Callable[..., Result]
) -> None:
    yaml = make_yaml(form="chat")
    told = cli("finetune", str(yaml), "model.chat_template={{ messages }}{% for m in messages %}")
    assert told.code == 1
    assert "model.chat_template" in told.err
    assert "line 1" in told.err
