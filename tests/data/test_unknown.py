"""Text that a tokenizer has no token for is told, with a piece of it, and only where there is some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import UnigramTrainer
from transformers import PreTrainedTokenizerFast

from tiny_encoders import word_pieces
from tiny_runs import tiny_tokenizer
from trimtab.data.unknown import tell_unknown
from trimtab.notes import Notes


def sentence_pieces() -> Any:
    """After the manner of T5's: no braces, no line break."""
    backend = Tokenizer(Unigram())
    backend.pre_tokenizer = Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(["the berth is free", "no wind at noon"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def told(tokenizer: Any, rows: Sequence[str], *, written: bool = True) -> list[str]:
    notes = Notes()
    encoded = [(f"row {at}", ["the", text], tokenizer(text)["input_ids"]) for at, text in enumerate(rows)]
    tell_unknown(encoded, tokenizer, notes, written=written)
    return list(notes)


def test_what_has_no_token_is_named_with_its_rows() -> None:
    assert told(sentence_pieces(), ["the berth", 'free {"a"', "no\nwind", "noon"]) == [
        "text that the tokenizer has no token for, such as '{\"', which the model reads as <unk> and cannot write: "
        "2 rows, the first in row 1. Change the rows, or give such texts tokens of their own (model.add_tokens)"
    ]


def test_a_model_that_only_reads_is_told_so() -> None:
    (note,) = told(word_pieces(), ["fog", "wind 🌊"], written=False)
    assert note.startswith("text that the tokenizer has no token for, such as '🌊', which the model reads as [UNK]: 1")


@pytest.mark.parametrize("unknown", [None, "<|eos|>"])
def test_bytes_are_all_known(unknown: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = unknown
    assert told(tokenizer, ["{ 🌊 }<|eos|>"]) == []
