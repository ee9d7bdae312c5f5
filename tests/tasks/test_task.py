"""Tasks are found by their files; what the one for causal models says of batches and loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import XLNetConfig

from tiny_runs import tiny_model, tiny_tokenizer, write_config, write_rows
from trimtab import tasks
from trimtab.config.read import load_config
from trimtab.data.rows import EncodedRow
from trimtab.errors import ConfigError

ROWS: list[EncodedRow] = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [9, 10], "labels": [-100, 10]},
]


def test_tasks_are_found_by_their_files() -> None:
    assert {"causal_lm", "sequence_classification"} <= set(tasks.names())
    assert tasks.find("causal_lm").model_class == "AutoModelForCausalLM"
    with pytest.raises(ConfigError, match=r"no task 'causal'.*Did you mean 'causal_lm'\?"):
        tasks.find("causal")


def test_a_model_that_reads_ahead_is_not_taught_to_write(tmp_path: Path) -> None:
    """It would see the tokens that it is to write, and its loss would say nothing."""
    XLNetConfig(architectures=["XLNetLMHeadModel"]).save_pretrained(tmp_path / "xlnet")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "fog"}])
    config = load_config(write_config(tmp_path / "run.yaml", tmp_path / "xlnet", rows, task="causal_lm"))
    with pytest.raises(ConfigError, match="reads a text in both directions"):
        tasks.job_of(config)


def test_the_loss_of_a_batch_is_that_of_its_answers_and_a_share_of_its_prompts() -> None:
    task, model = tasks.find("causal_lm"), tiny_model()
    batch = task.collator(tiny_tokenizer(), prompts=True)(ROWS)
    nats = -model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    answers = nats[0, 1, 7] + nats[0, 2, 8] + nats[1, 0, 10]
    prompts = nats[0, 0, 6]  # the first token of a row is predicted from nothing
    head = task.head(model)
    plain = {name: batch[name] for name in ("input_ids", "labels")}
    # float32: sums over 400 logits in another order.
    torch.testing.assert_close(task.loss(head, plain), answers / 3, rtol=1e-5, atol=0)
    torch.testing.assert_close(task.loss(head, batch, count=6), answers / 6, rtol=1e-5, atol=0)
    weighed = task.loss(head, batch, prompt_weight=0.5)
    torch.testing.assert_close(weighed, (answers + 0.5 * prompts) / 3, rtol=1e-5, atol=0)
