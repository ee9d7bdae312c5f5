"""Texts for a model with a head of its own: tokenised, cut and padded as the tokenizer does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.data.labelled import Labelled
from trimtab.errors import DataError, printable

KEPT = ("input_ids", "token_type_ids")


def tokenised(examples: Sequence[Labelled], tokenizer: Any, max_length: int | None) -> list[dict[str, Any]]:
    """``input_ids`` of each text, or of each pair, and ``cut``: whether it was longer than ``max_length`` tokens.

    Raises DataError for a text that has no token at all.
    """
    rows: list[dict[str, Any]] = [{}] * len(examples)
    for paired in (False, True):  # each as it would be read by itself, whatever the others are
        places = [at for at, example in enumerate(examples) if (example.pair is not None) == paired]
        if not places:
            continue
        texts = [examples[at].text for at in places]
        pairs = [examples[at].pair for at in places] if paired else None
        whole = tokenizer(texts, pairs, truncation=False, verbose=False)
        short = tokenizer(texts, pairs, truncation=True, max_length=max_length) if max_length is not None else whole
        for place, at in enumerate(places):
            rows[at] = {name: short[name][place] for name in KEPT if name in short}
            rows[at]["cut"] = len(whole["input_ids"][place]) > len(rows[at]["input_ids"])
    if empty := next((example for example, row in zip(examples, rows, strict=True) if not row["input_ids"]), None):
        raise DataError(f"{empty.place}: the text is empty, and this tokenizer puts nothing before it.")
    return rows


def require_ends(config: Any, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:
    """Raise DataError unless each of ``rows``, which stand at ``places``, has as many end tokens as the first: at the
    last of them a classifier reads that is an encoder with a decoder (BART, T5), and transformers asks for that.
    ``config``: of the model."""
    if not getattr(config, "is_encoder_decoder", False) or config.model_type.startswith("t5gemma"):
        return
    counts = [row["input_ids"].count(config.eos_token_id) for row in rows]
    for place, count in zip(places, counts, strict=True):
        if not count:
            raise DataError(f"{place}: no end token stands behind the text, and there such a model reads its label.")
        if count != counts[0]:
            raise DataError(
                f"{place}: the text has {count} end tokens and that of {places[0]} has {counts[0]}, and this kind of "
                "model takes rows of one number: give all a text_pair or none, and take the token out of the texts."
            )


def padded(rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
    """A batch of tokenised rows, padded to the longest on the side of ``tokenizer``, with its ``attention_mask``."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {
        "input_ids": tokenizer.pad_token_id,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
    }

    def stretched(name: str, values: Sequence[int]) -> list[int]:
        more = [fill[name]] * (width - len(values))
        return [*more, *values] if tokenizer.padding_side == "left" else [*values, *more]

    batch = {name: torch.tensor([stretched(name, row[name]) for row in rows]) for name in KEPT if name in rows[0]}
    ones = [[1] * len(row["input_ids"]) for row in rows]
    batch["attention_mask"] = torch.tensor([stretched("attention_mask", one) for one in ones])
    return batch


def decoded(row: dict[str, Any], tokenizer: Any) -> str:
    """The text of a tokenised row, with its special tokens, to show."""
    text: str = tokenizer.decode(row["input_ids"], skip_special_tokens=False)
    return printable(text if len(text) < 1500 else f"{text[:700]} [...] {text[-700:]}")


def sample(rows: int, length: int) -> dict[str, Tensor]:
    """A batch of that size, whatever its tokens are."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
