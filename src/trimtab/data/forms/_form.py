"""The base class of the forms, and what they share: reading texts from a row, and joining a prompt and an answer."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from decimal import Decimal
from typing import Any, ClassVar

from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Example, Row
from trimtab.errors import DataError

Messages = list[dict[str, Any]]


class Form(ABC):
    """One way to write rows down. A form has the name of its file."""

    keys: ClassVar[tuple[str, ...]]
    """The keys that every row of this form has, and by which it is recognised."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Further keys that are used where a row has them. All others are told."""
    precedence: ClassVar[int]
    """If a row has the keys of several forms, the form with the lowest precedence is taken."""
    has_template: ClassVar[bool] = False
    """Whether the form puts a template around the user's question."""

    def __init__(self) -> None:
        self.name = type(self).__module__.rpartition(".")[2]
        self.known = frozenset({*self.keys, *self.optional, "weight"})
        """The keys of which something is made; ``weight: 0`` leaves a row of any form out."""

    def fits(self, row: Row) -> bool:
        """Whether ``row`` has all keys of this form. A null counts as missing: columnar files fill gaps with nulls."""
        return all(row.value.get(key) is not None for key in self.keys)

    @abstractmethod
    def example(self, row: Row, reading: Reading) -> Example | None:
        """``row`` as an example; None if nothing of it is to be trained.

        Raises DataError, which names the place, if the row is not of this form.
        """

    def messages(self, row: Row, reading: Reading) -> Messages:
        """``row`` as a conversation, for a chat template. Raises DataError if the form has no question and answer."""
        raise DataError(f"{row.place}: a row of the form {self.name} is no conversation (keys: {keys_of(row)}).")

    def check(self, tokenizer: Any, place: str) -> None:  # noqa: B027 -- most forms need nothing
        """Raise DataError if ``tokenizer`` lacks what this form needs; ``place`` is that of the first row."""

    def prompt(self, text: str, tokenizer: Any, *, system: str = "") -> str:
        """The prompt that puts the user's question ``text`` as in the rows of this form, after ``system``."""
        return f"{system}\n\n{text}" if system else text

    def text(self, row: Row, key: str, reading: Reading, *, filled: bool = False, optional: bool = False) -> str:
        """The text under ``key``, with ``filled`` an error if it is blank, with ``optional`` empty if it is missing.

        Numbers and truth values are read as the text that JSON writes for them, which is told.
        """
        value = row.value.get(key)
        if not isinstance(value, str):
            if value is None and optional:
                return ""
            said = as_text(value)
            if said is None:
                raise DataError(f"{row.place}: {self.expected(row, key, 'a string')}")
            reading.tell(row.place, f"numbers or truth values under '{key}', which are read as text")
            value = said
        if filled and not value.strip():
            raise DataError(
                f"{row.place}: the answer '{key}' is empty, so there is nothing to learn; remove the row or fill it in "
                f"(keys found: {keys_of(row)})."
            )
        require_encodable(value, f"{row.place}: '{key}'")
        return value

    def expected(self, row: Row, key: str, kind: str) -> str:
        """The sentence for a message about the value under ``key``, which is missing or is not ``kind``."""
        value = row.value.get(key)
        if value is None:
            state = "is null" if key in row.value else "is missing"
            return f"key '{key}' of the form {self.name} {state}; keys found: {keys_of(row)}."
        return f"'{key}' must be {kind}, but is {type(value).__name__} {short(value)}; keys found: {keys_of(row)}."


class PairForm(Form):
    """A prompt and its answer in plain text. A form defines how the question is put, and which key has the answer.

    ``system`` stands before the prompt. ``history``, a list of earlier questions and answers, is put as the question
    is; its answers are trained, each with the end-of-sequence token after it.
    """

    optional: ClassVar[tuple[str, ...]] = ("system", "history")
    answer: ClassVar[str]
    """The key of the answer."""

    def opening(self, row: Row, reading: Reading) -> str:
        """What stands before everything else where the row has no ``system``."""
        return ""

    @abstractmethod
    def question(self, row: Row, reading: Reading) -> str:
        """What the user says, without any template."""

    def put(self, question: str) -> str:
        """``question`` in the form's template, up to where the answer begins."""
        return question

    def completion(self, row: Row, reading: Reading) -> str:
        """The answer, with the white space that belongs before it."""
        return self.text(row, self.answer, reading, filled=True)

    def asked(self, row: Row, reading: Reading) -> str:
        """The row's question in the form's template."""
        return self.put(self.question(row, reading))

    def example(self, row: Row, reading: Reading) -> Example | None:
        prompt = self.asked(row, reading)
        completion = self.completion(row, reading)
        if not row.value.keys().isdisjoint(("system", "history")):
            return self._continued(row, reading, prompt, completion)
        return pair(row, self.opening(row, reading) + prompt, completion, reading)

    def _continued(self, row: Row, reading: Reading, prompt: str, completion: str) -> Example:
        system = self.text(row, "system", reading, optional=True)
        before = f"{system}\n\n" if system.strip() else self.opening(row, reading)
        end = getattr(reading.tokenizer, "eos_token", None) or ""
        spans = []
        for question, answer in self._history(row):
            head, tail = _joined(self.put(question), reading.split_end(answer, row.place)[0])
            before += head
            spans.append((len(before), len(before) + len(tail) + len(end)))
            before += f"{tail}{end}\n\n"
        # Without an end token a model could not learn where these answers stop.
        return pair(row, before + prompt, completion, reading, earlier=tuple(spans) if end else ())

    def messages(self, row: Row, reading: Reading) -> Messages:
        system = self.text(row, "system", reading, optional=True)
        said = [{"role": "system", "content": system}] if system.strip() else []
        for question, answer in self._history(row):
            said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        answer = self.completion(row, reading)
        return [
            *said,
            {"role": "user", "content": self.question(row, reading)},
            {"role": "assistant", "content": answer},
        ]

    def _history(self, row: Row) -> list[tuple[str, str]]:
        history = row.value.get("history") or []
        good = isinstance(history, list) and all(
            isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(said, str) for said in turn)
            for turn in history
        )
        if not good:
            raise DataError(
                f"{row.place}: 'history' must be a list of [question, answer], two strings each, but is "
                f"{type(history).__name__} {short(history)}."
            )
        for turn in history:
            for said in turn:
                require_encodable(said, f"{row.place}: 'history'")
        return [(question, answer) for question, answer in history]

    def prompt(self, text: str, tokenizer: Any, *, system: str = "") -> str:
        row = Row("", 0, "", {})
        before = f"{system}\n\n" if system else self.opening(row, Reading(None))
        return before + self.put(text)


def pair(
    row: Row, prompt: str, completion: str, reading: Reading, *, earlier: tuple[tuple[int, int], ...] = ()
) -> Example:
    """Join prompt and completion into one text; ``earlier`` are spans of the prompt that carry loss, too.

    Spaces at the boundary become exactly one, which is trained: in byte-level vocabularies it is part of the answer's
    first token, and where it is a token of its own the model has to write it, too. If there is no space, the two are
    joined as they are. White space after the completion is removed, since the end-of-sequence token marks the end. If
    the completion has an end token of its own, that one marks the end.
    """
    said, end = reading.split_end(completion, row.place)
    if not said.strip():
        raise DataError(f"{row.place}: the answer has an end token and nothing before it; remove the row.")
    reading.look_for_ends(said, row.place)
    head, tail = _joined(prompt, said)
    text = head + tail
    answer = tail.strip()
    ends = not end or end == reading.tokenizer.eos_token
    whole = text if ends else text + end
    return Example(
        source=row.source,
        number=row.number,
        text=whole,
        trained=(*earlier, (len(head), len(whole))),
        prompt=text[: len(text) - len(answer)],
        answer=answer,
        ends=ends,
    )


def _joined(prompt: str, completion: str) -> tuple[str, str]:
    """The two texts, with the space between them, if there is one, at the beginning of the second."""
    gap = " " if prompt.endswith(" ") or completion.startswith(" ") else ""
    return prompt.rstrip(" "), gap + completion.rstrip().lstrip(" ")


def as_text(value: Any) -> str | None:
    """A number, also a decimal one of parquet, or a truth value as JSON writes it; None for anything else, and for what
    is not a number."""
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return str(value) if value.is_finite() else None
    return None


def require_encodable(value: str, what: str) -> None:
    """Raise DataError if ``value`` holds half a surrogate pair, which JSON can spell and UTF-8 cannot.

    Tokenizers fail on it without giving a reason.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start + 1}; "
            "no text encoding can hold it, so repair or remove it."
        ) from None


_KEYS = 12  # that a message names


def keys_of(row: Row) -> str:
    """The keys of ``row``, for a message."""
    names = [f"{key} (null)" if held is None else str(key) for key, held in row.value.items()]
    return (", ".join(names[:_KEYS]) + (", ..." if len(names) > _KEYS else "")) or "none at all"


def short(value: Any) -> str:
    """``value`` in at most sixty characters, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
