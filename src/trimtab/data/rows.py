"""The shapes that a row has on its way into a model.

`Row` is a row as it was read, `Example` one text and the parts of it that carry loss, `EncodedRow` token ids and their
labels. After that come batches: tensors by name, with many rows in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict


@dataclass(frozen=True)
class Row:
    """One row as it was read, and where it stands."""

    source: str
    """The file as the user named it, or the hub id."""
    number: int
    """Line of a jsonl file, else row of its file (a header not counted), from 1."""
    place: str
    """The two for a message: ``"train.jsonl, line 7"``."""
    value: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row, as the model will read it.

    Where there is an answer and no chat template puts anything after it, ``prompt + answer == text``. White space
    between the two is at the end of ``prompt``, whichever side of the row it came from.
    """

    source: str
    """The file as the user named it, or the hub id."""
    number: int
    """Line of a jsonl file, else row of its file without a header; both from 1."""
    text: str
    """The whole text that the model reads."""
    trained: tuple[tuple[int, int], ...]
    """Character spans ``(start, end)`` of ``text`` that carry loss; the whole of it for plain text."""
    prompt: str
    """The text before the last answer; empty for plain text."""
    answer: str | None
    """The last answer without outer white space; None for plain text."""
    ends: bool
    """Whether an end-of-sequence token follows ``text`` and is trained (no, where a chat template ends the turn)."""
    choices: tuple[str, ...] = ()
    """The answers to choose from, where the row brings its own; the true one is among them."""
    form: str = ""
    """The form in which the row was written, a name in ``trimtab.data.forms``."""


class EncodedRow(TypedDict):
    """Token ids of one example and its labels, lists of the same length.

    ``labels[t] == input_ids[t]`` where position ``t`` is to be predicted, -100 elsewhere; they are not shifted.
    ``labels[0]`` is always -100, since nothing comes before it to predict it from.
    """

    input_ids: list[int]
    labels: list[int]
