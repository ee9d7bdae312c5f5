"""Which rows do not fit into what a model reads, so that a figure says over what it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.rows import Example
from trimtab.data.tokens import encode_all, encode_prompt


@dataclass(frozen=True)
class Shortened:
    """Of a set of rows.

    Attributes:
        cut: rows of which the model does not read the beginning (of a plain text: the end).
        left_out: place and reason for each row that has no room at all for its answer, and is no part of the loss.
    """

    cut: int = 0
    left_out: tuple[tuple[str, str], ...] = ()


def shortened(examples: Sequence[Example], tokenizer: Any, limit: int | None, new: int | None = None) -> Shortened:
    """Which of ``examples`` do not fit into ``limit`` tokens. Raises DataError if none has a token that is measured.

    ``new``: how many of the tokens are kept for an answer that the model writes.
    """
    if limit is None or not examples:
        return Shortened()
    encoded = encode_all(examples, tokenizer, limit)
    left = tuple((f"{source}, row {number}", reason) for source, number, reason in encoded.dropped)
    if new is None:
        return Shortened(encoded.cut, left)
    return Shortened(sum(len(encode_prompt(row.prompt, tokenizer)) > limit - new for row in examples), left)
