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


def write_marking(folder: Path, kind: str) -> Path:
    """Write a model that marks texts with their languages, of the ``kind`` nllb, whose mark stands before a text, or
    mbart, whose mark stands after it; or a blenderbot, with NLLB's tokenizer. Its vocabulary is the letters of
    ``pair_rows``."""
    import transformers

    letters = sorted({*"".join(row["source"] + row["target"] for row in pair_rows(24))} - {" "})
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, **sides}
    sizes |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "dropout": 0.0}
    tokenizer: Any
    model: Any
    torch.manual_seed(0)
    if kind != "mbart":
        vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", *letters]
        languages = ["eng_Latn", "deu_Latn", "fra_Latn"]
        tokenizer = transformers.NllbTokenizer(
            vocab={token: number for number, token in enumerate(vocabulary)}, extra_special_tokens=languages
        )
        sizes |= {"vocab_size": len(tokenizer), "decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
        if kind == "nllb":
            model = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**sizes))
        else:
            model = transformers.BlenderbotForConditionalGeneration(transformers.BlenderbotConfig(**sizes))
    else:
        scores = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
        tokenizer = transformers.MBartTokenizer(vocab=[*scores, *((letter, -2.0) for letter in letters)])
        model = transformers.MBartForConditionalGeneration(transformers.MBartConfig(**sizes, vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
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
