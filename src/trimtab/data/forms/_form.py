"""The base class of the forms, and what they share: reading texts from a row, and joining a prompt and an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from trimtab.data.rows import Example, Row
from trimtab.errors import DataError


class Form(ABC):
    """One way to write rows down. A form has the name of its file."""

    keys: ClassVar[tuple[str, ...]]
    """The keys that every row of this form has, and by which it is recognised. Further keys are allowed."""
    precedence: ClassVar[int]
    """If a row has the keys of several forms, the form with the lowest precedence is taken."""
    has_template: ClassVar[bool] = False
    """Whether the form puts a template around the user's question."""

    def __init__(self) -> None:
        self.name = type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def example(self, row: Row, tokenizer: Any) -> Example:
        """``row`` as an example. Raises DataError, which names the place, if the row is not of this form."""

    def check(self, tokenizer: Any, place: str) -> None:  # noqa: B027 -- most forms need nothing
        """Raise DataError if ``tokenizer`` lacks what this form needs; ``place`` is that of the first row."""

    def prompt(self, text: str, tokenizer: Any) -> str:
        """The prompt that puts the user's question ``text`` as in the rows of this form."""
        return text

    def text(self, row: Row, key: str, *, filled: bool = False, optional: bool = False) -> str:
        """The text under ``key``, with ``filled`` an error if it is blank, with ``optional`` empty if it is missing."""
        value = row.value.get(key)
        if value is None and optional:
            return ""
        if not isinstance(value, str):
            raise DataError(f"{row.place}: {self.expected(row, key, 'a string')}")
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


def pair(row: Row, prompt: str, completion: str) -> Example:
    """Join prompt and completion into one text.

    Spaces at the boundary become exactly one, which is trained: in byte-level vocabularies it is part of the answer's
    first token, and where it is a token of its own the model has to write it, too. If there is no space, the two are
    joined as they are. White space after the completion is removed, since the end-of-sequence token marks the end.
    """
    head, tail = prompt.rstrip(" "), completion.rstrip().lstrip(" ")
    gap = " " if prompt.endswith(" ") or completion.startswith(" ") else ""
    text = head + gap + tail
    answer = tail.strip()
    return Example(
        source=row.source,
        number=row.number,
        text=text,
        trained=((len(head), len(text)),),
        prompt=text[: len(text) - len(answer)],
        answer=answer,
        ends=True,
    )


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


def keys_of(row: Row, most: int = 12) -> str:
    """The keys of ``row``, for a message."""
    names = [f"{key} (null)" if value is None else str(key) for key, value in row.value.items()]
    return (", ".join(names[:most]) + (", ..." if len(names) > most else "")) or "none at all"


def short(value: Any) -> str:
    """``value`` in at most sixty characters, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
