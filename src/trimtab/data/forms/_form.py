"""What a form of rows has to say of itself, and what the forms share: reading texts out of a row, and joining two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from trimtab.data.rows import Example, Row
from trimtab.errors import DataError


class Form(ABC):
    """One way to write rows down. The name of a form is that of its file."""

    keys: ClassVar[tuple[str, ...]]
    """The keys that a row of this form has, by which it is recognised. Any further key is allowed."""
    precedence: ClassVar[int]
    """Where a row has the keys of several forms, the one of the lowest number is taken."""
    has_template: ClassVar[bool] = False
    """Whether the form puts a template of its own around what a person asks."""

    def __init__(self) -> None:
        self.name = type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def example(self, row: Row, tokenizer: Any) -> Example:
        """What becomes of ``row``. Raises DataError, which names its place, if it is not of this form."""

    def check(self, tokenizer: Any, place: str) -> None:  # noqa: B027 -- most forms need nothing
        """Raise DataError if ``tokenizer`` lacks what this form needs; ``place`` is that of the first row."""

    def prompt(self, text: str, tokenizer: Any) -> str:
        """What a model that was trained on such rows reads where a person asks ``text``."""
        return text

    def text(self, row: Row, key: str, *, filled: bool = False, optional: bool = False) -> str:
        """The text under ``key``. ``filled``: not only white space. ``optional``: empty where the key is missing."""
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
        """A sentence on the value under ``key``, which is missing or is not ``kind``."""
        value = row.value.get(key)
        if value is None:
            state = "is null" if key in row.value else "is missing"
            return f"key '{key}' of the form {self.name} {state}; keys found: {keys_of(row)}."
        return f"'{key}' must be {kind}, but is {type(value).__name__} {short(value)}; keys found: {keys_of(row)}."


def pair(row: Row, prompt: str, completion: str) -> Example:
    """Join prompt and completion into one text.

    Spaces that meet at the boundary become exactly one, and it counts as trained: in byte-level vocabularies it is
    part of the answer's first token, and where it is a token of its own the model must write it too. Without any space
    there, the two are joined as they are. White space after the completion goes: the end-of-sequence token marks the
    end.
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
    """Raise DataError if ``value`` holds half of a surrogate pair. JSON can spell one; it has no UTF-8 form, and
    tokenizers fail on it without giving a reason."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start + 1}; "
            "no text encoding can hold it, so repair or remove it."
        ) from None


def keys_of(row: Row, most: int = 12) -> str:
    """The keys of ``row`` for a message."""
    names = [f"{key} (null)" if value is None else str(key) for key, value in row.value.items()]
    return (", ".join(names[:most]) + (", ..." if len(names) > most else "")) or "none at all"


def short(value: Any) -> str:
    """``value`` for a message, in at most sixty characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
