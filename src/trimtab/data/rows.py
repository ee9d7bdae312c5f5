"""Rows become examples: one text for the model to read, and the parts of it that carry loss.

The form of a row is recognised from its keys, in the order of ``FORMS``. All rows of a run have the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from trimtab.data.chat import follow_template, require_template
from trimtab.data.multiple_choice import PROMPT, read_question
from trimtab.data.sources import Row, read_rows
from trimtab.errors import DataError, did_you_mean

FORMS: dict[str, tuple[str, ...]] = {
    "finlora": ("context", "target"),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "multiple_choice": ("question", "choices"),
    "chat": ("messages",),
    "text": ("text",),
}
"""The name of each form and the keys that its rows must have, in the order in which they are tried.

``alpaca`` rows may have an ``input`` as well. ``multiple_choice`` also reads LLM-Adapters' commonsense rows, if it is
named: by their keys they are ``alpaca``. Any further key is allowed and ignored.
"""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


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


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """The examples of one source or several, all of one form. A slice of it is an ``Examples`` again."""

    rows: tuple[Example, ...]
    form: str
    """One of the names in ``FORMS``."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        return Examples(self.rows[index], self.form) if isinstance(index, slice) else self.rows[index]


def read_examples(source: str | list[str], tokenizer: Any, *, root: Path, form: str = "auto") -> Examples:
    """Read a file, a hub dataset, or several of them one after the other.

    Args:
        source: what ``sources.read_rows`` takes, or a list of it.
        tokenizer: a transformers tokenizer; only ``chat`` rows use it, for its template.
        root: the folder that relative paths start from.
        form: a name in ``FORMS``, or ``"auto"`` to recognise it from the keys of the first row.

    Raises:
        DataError: a source cannot be read, or a row is not of the shape of its form; the message names file and row.
    """
    if form != "auto" and form not in FORMS:
        known = ["auto", *FORMS]
        raise DataError(
            f"Data form '{form}' is not known; expected one of {', '.join(known)}.{did_you_mean(form, known)}"
        )
    names = [source] if isinstance(source, str) else list(source)
    if not names:
        raise DataError("The list of data files is empty; name at least one file or hub dataset.")
    examples: list[Example] = []
    first: Row | None = None
    chosen = form
    for name in names:
        for row in read_rows(name, root=root):
            if first is None:
                first = row
                chosen = _recognise(row) if form == "auto" else form
                if chosen == "chat":
                    require_template(tokenizer, row.place)
            elif form == "auto":
                _require_same_form(row, chosen, first)
            examples.append(_READERS[chosen](row, tokenizer))
    return Examples(tuple(examples), chosen)


def _form_of(row: Row) -> str | None:
    """The first form whose keys this row has. A null counts as missing: columnar files fill gaps with it."""
    present = {key for key, value in row.value.items() if value is not None}
    return next((form for form, keys in FORMS.items() if present.issuperset(keys)), None)


def _recognise(row: Row) -> str:
    form = _form_of(row)
    if form is None:
        expected = "; ".join(f"{'/'.join(keys)} ({name})" for name, keys in FORMS.items())
        raise DataError(f"{row.place}: no known form has these keys: {_keys(row)}. Expected one of: {expected}.")
    return form


def _require_same_form(row: Row, form: str, first: Row) -> None:
    other = _form_of(row)
    if other is not None and other != form:
        raise DataError(
            f"{row.place}: forms are mixed: this row is of the form {other} (keys: {_keys(row)}), but {first.place} is "
            f"{form}. Put the rows of each form into a file of their own, or name the form in the config."
        )


def _keys(row: Row, most: int = 12) -> str:
    names = [f"{key} (null)" if value is None else str(key) for key, value in row.value.items()]
    return (", ".join(names[:most]) + (", ..." if len(names) > most else "")) or "none at all"


def _string(row: Row, form: str, key: str, *, filled: bool = False, optional: bool = False) -> str:
    """The text under ``key``. ``filled``: not only white space. ``optional``: empty where the key is missing."""
    value = row.value.get(key)
    if value is None and optional:
        return ""
    if value is None:
        state = "is null" if key in row.value else "is missing"
        raise DataError(f"{row.place}: key '{key}' of the form {form} {state}; keys found: {_keys(row)}.")
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: '{key}' must be a string, but is {type(value).__name__} {_short(value)}; "
            f"keys found: {_keys(row)}."
        )
    if filled and not value.strip():
        raise DataError(
            f"{row.place}: the answer '{key}' is empty, so there is nothing to learn; remove the row or fill it in "
            f"(keys found: {_keys(row)})."
        )
    _require_encodable(value, f"{row.place}: '{key}'")
    return value


def _require_encodable(value: str, what: str) -> None:
    """Half of a surrogate pair (JSON can spell one) has no UTF-8 form, and tokenizers fail on it without a reason."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start + 1}; "
            "no text encoding can hold it, so repair or remove it."
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _pair(row: Row, prompt: str, completion: str) -> Example:
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


def _finlora(row: Row, tokenizer: Any) -> Example:
    return _pair(row, _string(row, "finlora", "context"), _string(row, "finlora", "target", filled=True))


def _completion(row: Row, tokenizer: Any) -> Example:
    return _pair(row, _string(row, "completion", "prompt"), _string(row, "completion", "completion", filled=True))


def _alpaca(row: Row, tokenizer: Any) -> Example:
    instruction = _string(row, "alpaca", "instruction")
    context = _string(row, "alpaca", "input", optional=True)
    template = ALPACA_WITH_INPUT if context.strip() else ALPACA_WITHOUT_INPUT
    output = _string(row, "alpaca", "output", filled=True)
    return _pair(row, template.format(instruction=instruction, input=context), output.strip())


def _multiple_choice(row: Row, tokenizer: Any) -> Example:
    try:
        found = read_question(row.value)
    except ValueError as error:
        raise DataError(f"{row.place}: {error} (keys found: {_keys(row)}).") from None
    for text in (found.question, *found.choices):
        _require_encodable(text, row.place)
    pair = _pair(row, PROMPT.format(question=found.question), f" {found.answer}")
    return replace(pair, choices=found.choices)


def _chat(row: Row, tokenizer: Any) -> Example:
    messages = row.value.get("messages")
    if messages is None:
        state = "is null" if "messages" in row.value else "is missing"
        raise DataError(f"{row.place}: key 'messages' of the form chat {state}; keys found: {_keys(row)}.")
    if not isinstance(messages, list):
        raise DataError(
            f"{row.place}: 'messages' must be a list, but is {type(messages).__name__} {_short(messages)}; "
            f"keys found: {_keys(row)}."
        )
    turns = [_message(row, number, message) for number, message in enumerate(messages, start=1)]
    if not any(turn["role"] == "assistant" for turn in turns):
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise DataError(
            f"{row.place}: no message has the role 'assistant', so there is nothing to learn (roles: {roles})."
        )
    chat = follow_template(turns, tokenizer, row.place)
    return Example(row.source, row.number, chat.text, chat.spans, chat.prompt, chat.answer, chat.ends)


def _message(row: Row, number: int, message: Any) -> dict[str, Any]:
    place = f"{row.place}, message {number}"
    if not isinstance(message, dict):
        raise DataError(
            f"{place}: must be an object with 'role' and 'content', but is {type(message).__name__} {_short(message)}."
        )
    kept = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        value = kept.get(key)
        if not isinstance(value, str):
            state = f"{type(value).__name__} {_short(value)}" if key in kept else "missing"
            raise DataError(
                f"{place}: '{key}' must be a string, but is {state}; keys found: {', '.join(message) or 'none'}."
            )
        _require_encodable(value, f"{place}: '{key}'")
    if kept["role"] == "assistant" and not kept["content"].strip():
        raise DataError(
            f"{place}: the assistant's content is empty, so there is nothing to learn; remove the turn or the row."
        )
    return kept


def _text(row: Row, tokenizer: Any) -> Example:
    text = _string(row, "text", "text")
    return Example(row.source, row.number, text, ((0, len(text)),), "", None, True)


_READERS: dict[str, Callable[[Row, Any], Example]] = {
    "finlora": _finlora,
    "completion": _completion,
    "alpaca": _alpaca,
    "multiple_choice": _multiple_choice,
    "chat": _chat,
    "text": _text,
}
