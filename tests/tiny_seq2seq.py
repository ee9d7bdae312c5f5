"""A tiny T5 with a tokenizer, as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny_runs import tiny_tokenizer
from trimtab.config.read import build_config


def write_t5(folder: Path) -> Path:
    """Write the model: two blocks on either side, 32 wide, with a vocabulary of 400 tokens."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tiny_tokenizer(None)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=400,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Sources and targets of several lengths."""
    words = ["the", "report", "of", "a", "late", "ferry", "was", "written", "twice", "by", "hand"]
    return [
        {"source": " ".join(words[at % 5 :][: 3 + at % 4]), "target": " ".join(words[at % 7 :][: 1 + at % 3])}
        for at in range(count)
    ]


def seq2seq_config(folder: Path, **sections: Any) -> Any:
    """A run's configuration in ``folder``, whose model and rows were written there."""
    data = {"train": "train.jsonl", "validation": "train.jsonl[:6]", "test": "train.jsonl[:5]"}
    said = {
        "model": str(folder / "t5"),
        "data": data | sections.pop("data", {}),
        "train": {"epochs": 1, "batch_size": 4, "precision": "float32"} | sections.pop("train", {}),
        "evaluation": {"max_new_tokens": 6},
        "output": str(folder / "run"),
        **sections,
    }
    return build_config(said, folder, "run.yaml")
