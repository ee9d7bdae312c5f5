"""Where rows come from, `Source`, and the three shapes of a row before it is put into a batch: `Row`, `Example`,
`EncodedRow`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from trimtab.files import content_digest


class Source(BaseModel):
    """Rows of one kind: where they are, and how they are read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    path: str = Field(
        min_length=1,
        description="A file, a pattern such as data/*.jsonl, a hub id, or a folder that datasets saved; with a slice "
        "such as rows.jsonl[:500] or rows.jsonl[10%:] a part of it.",
    )
    form: str | None = Field(None, description="The form of these rows; null: data.form.")
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often the rows come in an epoch: 2 is each of them twice, 0.5 half of them, drawn once by "
        "the seed. Training rows only.",
    )
    columns: dict[str, str] | None = Field(
        None, description="A key of our forms -> the column of these rows that holds it; null: data.columns."
    )

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> Any:
        """The path alone, where nothing else was said."""
        said = {
            key: value for key, value in handler(self).items() if value != type(self).model_fields[key].get_default()
        }
        return self.path if said.keys() == {"path"} else said

    def within(self, form: str, columns: Mapping[str, str]) -> Source:
        """The same rows, read in ``form`` and with ``columns`` where they say neither."""
        settled = {
            "form": self.form if self.form is not None else form,
            "columns": self.columns if self.columns is not None else dict(columns),
        }
        return self.model_copy(update=settled)


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
    entry: Source | None = field(default=None, compare=False)
    """What the configuration says of where the row comes from: its weight, among others."""

    @property
    def place(self) -> str:
        """Where the row stands, for a message."""
        return f"{self.source}, row {self.number}"

    def with_answer(self, answer: str, *, ends: bool) -> Example:
        """The same prompt, followed by ``answer`` in place of its own."""
        text = self.prompt + answer
        start = len(self.prompt.rstrip(" "))
        return replace(self, text=text, trained=((start, len(text)),), answer=answer, ends=ends)


class Answered(Protocol):
    """What all tasks' rows have: where they stand, and what the right answer is."""

    @property
    def source(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def form(self) -> str: ...
    @property
    def entry(self) -> Source | None: ...
    @property
    def place(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str | None: ...


OneAnswered = TypeVar("OneAnswered", bound=Answered)


def digest(examples: Sequence[Answered], times: Sequence[int] | None = None) -> str:
    """By which the same rows are known again, in their order and each so many ``times``, wherever they lie. Where they
    name pictures, what those hold stands behind a blank."""
    found, pictures = hashlib.sha256(), []
    for index, example in enumerate(examples):
        found.update(_told([_said(example, "image"), times[index] if times is not None else 1]))
        if (picture := getattr(example, "image", "")) and not getattr(example, "content", b""):
            pictures.append(content_digest(Path(picture)))
    digests = [found, hashlib.sha256("".join(pictures).encode())] if pictures else [found]
    return " ".join(one.hexdigest() for one in digests)


def fingerprint(example: Answered) -> bytes:
    """Equal for two rows that say the same, wherever they lie."""
    return hashlib.sha256(_told(_said(example))).digest()


def _said(example: Answered, *besides: str) -> list[Any]:
    """What a row says, without where it stands."""
    left_out = ("source", "number", "entry", *besides)
    return [getattr(example, part.name) for part in fields(example) if part.name not in left_out]  # type: ignore[arg-type]


def _told(values: list[Any]) -> bytes:
    return json.dumps(values, default=lambda content: hashlib.sha256(content).hexdigest()).encode()


class EncodedRow(TypedDict):
    """Token ids of one example and its labels, lists of the same length.

    ``labels[t]`` is ``input_ids[t]`` where that token carries loss and -100 elsewhere; labels are not shifted.
    ``labels[0]`` is always -100, since no token comes before it.
    """

    input_ids: list[int]
    labels: list[int]
