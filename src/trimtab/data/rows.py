"""The three shapes of a row before it is put into a batch: `Row`, `Example`, `EncodedRow`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypedDict


@dataclass(frozen=True)
class Row:
    """One row as it was read, and where it stands."""

    source: str
    """The file as the user named it, or the hub id."""
    number: int
    """Line of a jsonl file, else row of its file (a header not counted), from 1."""
    place: str
    """Both, for a message: ``"train.jsonl, line 7"``."""
    value: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row as the model will read it: a text, and the parts of it that carry loss.

    Where there is an answer and no chat template puts anything after it, ``prompt + answer == text``. White space
    between the two is at the end of ``prompt``, whichever side of the row it came from.
    """

    source: str
    number: int
    """Both as in `Row`."""
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

    @property
    def place(self) -> str:
        """Where the row stands, for a message."""
        return f"{self.source}, row {self.number}"

    def with_answer(self, answer: str, *, ends: bool) -> Example:
        """The same prompt, followed by ``answer`` in place of its own."""
        text = self.prompt + answer
        start = len(self.prompt.rstrip(" "))
        return replace(self, text=text, trained=((start, len(text)),), answer=answer, ends=ends)


class EncodedRow(TypedDict):
    """Token ids of one example and its labels, lists of the same length.

    ``labels[t]`` is ``input_ids[t]`` where that token carries loss and -100 elsewhere; labels are not shifted.
    ``labels[0]`` is always -100, since no token comes before it.
    """

    input_ids: list[int]
    labels: list[int]
