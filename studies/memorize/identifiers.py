"""Pairs of random identifiers to memorise: nothing about a value can be guessed, so what comes out was stored.

A row is ``KEY:VALUE`` in hexadecimal digits, as in the UUID study of MoRA (arXiv 2405.12130, section 3). Every
character is a token of its own, whatever the tokenizer would make of ``dead`` or ``be``: so all rows have one length,
and a character is as much to remember as any other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.data.tokens import encode_prompt
from trimtab.errors import ConfigError, ModelError
from trimtab.evaluation.generation import greedy
from trimtab.models.causal_head import IGNORED
from trimtab.surgery.contexts import evaluating

DIGITS = "0123456789abcdef"
SEPARATOR = ":"
ROWS_AT_ONCE = 256
"""Values that are written together."""


def draw_pairs(count: int, digits: int, seed: int) -> list[tuple[str, str]]:
    """``count`` keys and values of so many hexadecimal digits; the same for the same seed, and no key twice.

    Raises ConfigError where more than half of all keys of that length would be needed.
    """
    if 2 * count > len(DIGITS) ** digits:
        raise ConfigError(
            f"pairs: {count:,} keys of {digits} hexadecimal digits would be more than half of all there are "
            f"({len(DIGITS) ** digits:,}); take fewer pairs or more digits"
        )
    generator = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        key, value = ("".join(generator.choices(DIGITS, k=digits)) for _ in range(2))
        pairs.setdefault(key, value)
    return list(pairs.items())


@dataclass(frozen=True)
class Rows:
    """The pairs as tokens: ``input_ids`` and ``labels`` ``[pairs, tokens]``, -100 but for the value; ``prompt`` is how
    many tokens come before the value."""

    input_ids: Tensor
    labels: Tensor
    prompt: int
    values: tuple[str, ...]

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        return replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device))


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> Rows:
    """One token for each character, after whatever the tokenizer puts before every text.

    Raises ModelError if some character is no token of its own.
    """
    known = tokenizer.get_vocab()
    if missing := [one for one in DIGITS + SEPARATOR if one not in known]:
        raise ModelError(
            f"the tokenizer has no token for the single characters {' '.join(missing)}, of which identifiers are "
            "made; choose a model whose vocabulary has all hexadecimal digits and the colon"
        )
    before = encode_prompt("", tokenizer)
    ids = torch.tensor([before + [known[one] for one in f"{key}{SEPARATOR}{value}"] for key, value in pairs])
    prompt = ids.shape[1] - len(pairs[0][1])
    labels = ids.clone()
    labels[:, :prompt] = IGNORED
    return Rows(ids, labels, prompt, tuple(value for _, value in pairs))


def character_accuracy(written: Sequence[str], values: Sequence[str]) -> float:
    """The share of the values' characters that stand in their place in what was written."""
    pairs = zip(written, values, strict=True)
    right = sum(one == other for text, value in pairs for one, other in zip(text, value, strict=False))
    return right / sum(map(len, values))


def recall(model: Any, tokenizer: Any, rows: Rows) -> float:
    """The character accuracy of what ``model`` writes by itself after each key, greedily.

    Every token it writes is fed back to it, so what follows an error is written after that error.
    """
    tokens = rows.input_ids.shape[1] - rows.prompt
    written: list[str] = []
    with evaluating(model):
        for ids in rows.input_ids[:, : rows.prompt].split(ROWS_AT_ONCE):
            new = greedy(model, ids, torch.ones_like(ids), max_new_tokens=tokens)
            written += tokenizer.batch_decode(new, clean_up_tokenization_spaces=False)
    return character_accuracy(written, rows.values)
