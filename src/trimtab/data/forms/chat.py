"""Conversations, ``{"messages": [{"role": ..., "content": ...}, ...]}``, rendered by the tokenizer's chat template.

The assistant's turns carry loss. If the template marks them itself (``{% generation %}``), its marks are used. If not,
the messages before a turn are rendered alone: if the whole text begins with the result, the turn starts at its end.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from trimtab.data.forms import _form
from trimtab.data.rows import Example, Row
from trimtab.errors import DataError, ModelError
from trimtab.models.chat_template import render

Messages = list[dict[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(_form.Form):
    """Messages; the assistant's turns carry loss."""

    keys = ("messages",)
    precedence = 5
    has_template = True

    def check(self, tokenizer: Any, place: str) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(
                f"{place}: the row is a conversation, but the tokenizer {_name(tokenizer)} has no chat template; use a "
                "model that was tuned for chat, set tokenizer.chat_template, or turn the rows into prompt/completion."
            )

    def example(self, row: Row, tokenizer: Any) -> Example:
        messages = row.value.get("messages")
        if not isinstance(messages, list):
            raise DataError(f"{row.place}: {self.expected(row, 'messages', 'a list')}")
        turns = [_message(f"{row.place}, message {number}", said) for number, said in enumerate(messages, start=1)]
        if not any(turn["role"] == "assistant" for turn in turns):
            roles = ", ".join(turn["role"] for turn in turns) or "none"
            raise DataError(
                f"{row.place}: no message has the role 'assistant', so there is nothing to learn (roles: {roles})."
            )
        return follow_template(turns, tokenizer, row)

    def prompt(self, text: str, tokenizer: Any) -> str:
        if not tokenizer.chat_template:
            raise DataError(f"{_name(tokenizer)}: the tokenizer has no chat template; use --plain")
        messages = [{"role": "user", "content": text}]
        return str(render(tokenizer, messages, add_generation_prompt=True))


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _message(place: str, message: Any) -> dict[str, Any]:
    """``message`` without keys that are null. Raises DataError if it is malformed, or an empty turn to be learned."""
    if not isinstance(message, dict):
        raise DataError(
            f"{place}: must be an object with 'role' and 'content', but is {type(message).__name__} "
            f"{_form.short(message)}."
        )
    kept = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        value = kept.get(key)
        if not isinstance(value, str):
            state = f"{type(value).__name__} {_form.short(value)}" if key in kept else "missing"
            raise DataError(
                f"{place}: '{key}' must be a string, but is {state}; keys found: {', '.join(message) or 'none'}."
            )
        _form.require_encodable(value, f"{place}: '{key}'")
    if kept["role"] == "assistant" and not kept["content"].strip():
        raise DataError(
            f"{place}: the assistant's content is empty, so there is nothing to learn; remove the turn or the row."
        )
    return kept


def follow_template(messages: Messages, tokenizer: Any, row: Row) -> Example:
    """Render the messages of ``row`` and locate the assistant's turns, each with the token that ends it.

    Messages after the last assistant turn carry no loss and are left out, as is white space after that turn. Raises
    DataError if the template refuses the messages, or if a turn cannot be located in the text.
    """
    place = row.place
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    messages = messages[: turns[-1] + 1]
    text = _render(messages, tokenizer, place)
    if _GENERATION.search(tokenizer.get_chat_template()):
        spans = _marked_spans(messages, tokenizer, place)
    else:
        spans = [_find_turn(messages, index, text, tokenizer, place) for index in turns]
    start, stop = spans[-1]
    text = text[:stop]
    # Any special token may end a turn.
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    specials = tuple({*tokenizer.all_special_tokens, *added})
    begin, answer = _locate_answer(text, start, messages[-1]["content"].strip(), specials)
    return Example(
        source=row.source,
        number=row.number,
        text=text,
        trained=tuple(spans),
        prompt=text[:begin],
        answer=answer,
        ends=not text.endswith(specials),
    )


def _render(messages: Messages, tokenizer: Any, place: str, *, generation: bool = False) -> str:
    try:
        return str(render(tokenizer, messages, add_generation_prompt=generation))
    except ModelError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"{place}: {error} (roles: {roles or 'none'}). Change the row to what the template allows, or use "
            "prompt/completion rows."
        ) from None


def _find_turn(messages: Messages, index: int, text: str, tokenizer: Any, place: str) -> tuple[int, int]:
    """The start of turn ``messages[index]`` in ``text``, after its header, and its end, after its end mark."""
    before = _render(messages[:index], tokenizer, place, generation=True)
    start = len(before)
    if not text.startswith(before):
        # Some templates open a new turn with more than a past turn has ("<think>"): the turn starts where they differ.
        if not text.startswith(_render(messages[:index], tokenizer, place)):
            raise _lost(place, index, "what comes before it is rendered in another way once it is there")
        start = next(at for at in range(start) if text[at : at + 1] != before[at])
    through = _render(messages[: index + 1], tokenizer, place).rstrip()
    if text.startswith(through) and len(through) > start:
        return start, len(through)
    # Some templates render the last turn differently from a past one (Qwen3 puts empty reasoning before it). Both end
    # in the same way, so we search for the content together with that ending.
    content = messages[index]["content"].strip()
    if content not in through:
        raise _lost(place, index, "its content is changed")
    turn = content + through[through.rfind(content) + len(content) :]
    begin = text.find(turn, start)
    if begin < 0:
        raise _lost(place, index, "its content is changed, or left out, once another turn follows")
    return start, begin + len(turn)


def _lost(place: str, index: int, reason: str) -> DataError:
    return DataError(
        f"{place}, message {index + 1}: the chat template cannot be followed, so it is unknown where in its text this "
        f"assistant turn is: {reason}. Give each row one assistant turn, at its end; or use a template with "
        "{% generation %} marks; or turn the rows into prompt/completion."
    )


def _marked_spans(messages: Messages, tokenizer: Any, place: str) -> list[tuple[int, int]]:
    """The character spans that a template with ``{% generation %}`` marks."""
    out = render(
        tokenizer,
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    tokens = zip(out["assistant_masks"], out["offset_mapping"], strict=True)
    runs = [[offsets for _, offsets in run] for marked, run in groupby(tokens, key=lambda token: token[0]) if marked]
    spans = [(run[0][0], run[-1][1]) for run in runs]
    if not spans:
        raise DataError(f"{place}: the chat template marks no text as the assistant's; check its generation marks.")
    return spans


def _locate_answer(text: str, start: int, content: str, specials: tuple[str, ...]) -> tuple[int, str]:
    """The start of the last answer in ``text``, and the answer itself without the token that ends the turn."""
    begin = text.find(content, start)
    if begin >= 0:
        return begin, content
    # The template changed the content, for instance the layout of reasoning: the answer is then the turn as rendered.
    turn = text[start:]
    for special in specials:
        turn = turn.removesuffix(special)
    answer = turn.strip()
    return start + turn.index(answer), answer
