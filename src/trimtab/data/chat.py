"""Conversations become one text through the tokenizer's own chat template, and the assistant's turns are found in it.

A template is a program, so a turn's place is found by running it on the messages before the turn and looking whether
what comes out begins the whole text. A template that marks the assistant's part itself (``{% generation %}``) is
believed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from trimtab.errors import DataError

Messages = list[dict[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Chat:
    """A rendered conversation; the fields are those of ``rows.Example``."""

    text: str
    spans: tuple[tuple[int, int], ...]
    prompt: str
    answer: str
    ends: bool


def require_template(tokenizer: Any, place: str) -> None:
    """Raise DataError unless the tokenizer has a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"{place}: the row is a conversation, but the tokenizer {name} has no chat template; use a model that was "
            "tuned for chat, set tokenizer.chat_template, or turn the rows into prompt/completion."
        )


def follow_template(messages: Messages, tokenizer: Any, place: str) -> Chat:
    """Render messages and find the assistant's turns, each with the token that ends it.

    Messages after the last assistant turn carry no loss and are left out, as is white space after that turn.

    Raises:
        DataError: the template refuses the messages, or its text cannot be traced back to them.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    messages = messages[: turns[-1] + 1]
    text = _render(messages, tokenizer, place)
    if _GENERATION.search(tokenizer.get_chat_template()):
        spans = _marked_spans(messages, tokenizer, place)
    else:
        spans = [_find_turn(messages, index, text, tokenizer, place) for index in turns]
    start, stop = spans[-1]
    text = text[:stop]
    specials = _specials(tokenizer)
    begin, answer = _locate_answer(text, start, messages[-1]["content"].strip(), specials)
    return Chat(text, tuple(spans), text[:begin], answer, not text.endswith(specials))


def _render(messages: Messages, tokenizer: Any, place: str, *, generation: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"{place}: the chat template cannot render these messages (roles: {roles or 'none'}): {error}. "
            "Change the row to what the template allows, or use prompt/completion rows."
        ) from error


def _find_turn(messages: Messages, index: int, text: str, tokenizer: Any, place: str) -> tuple[int, int]:
    """Where the turn ``messages[index]`` begins in ``text`` (after its header) and ends (after its end mark)."""
    before = _render(messages[:index], tokenizer, place, generation=True)
    start = len(before)
    if not text.startswith(before):
        # Some templates open the model's turn with more than a past turn has ("<think>"): take what the two share.
        if not text.startswith(_render(messages[:index], tokenizer, place)):
            raise _lost(place, index, "what comes before it is rendered in another way once it is there")
        start = next(at for at in range(start) if text[at : at + 1] != before[at])
    through = _render(messages[: index + 1], tokenizer, place).rstrip()
    if text.startswith(through) and len(through) > start:
        return start, len(through)
    # Some templates render the last turn in another way than a past one (Qwen3 puts empty reasoning before it). What
    # ends a turn is the same in both, so the turn is found by its content and that ending.
    content = messages[index]["content"].strip()
    if content not in through:
        raise _lost(place, index, "its content is changed")
    wanted = content + through[through.rfind(content) + len(content) :]
    found = text.find(wanted, start)
    if found < 0:
        raise _lost(place, index, "its content is changed, or left out, once another turn follows")
    return start, found + len(wanted)


def _lost(place: str, index: int, reason: str) -> DataError:
    return DataError(
        f"{place}, message {index + 1}: the chat template cannot be followed, so it is unknown where in its text this "
        f"assistant turn is: {reason}. Give each row one assistant turn, at its end; or use a template with "
        "{% generation %} marks; or turn the rows into prompt/completion."
    )


def _marked_spans(messages: Messages, tokenizer: Any, place: str) -> list[tuple[int, int]]:
    """The character spans that a template with ``{% generation %}`` marks."""
    out = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans: list[tuple[int, int]] = []
    inside = False
    for marked, (first, last) in zip(out["assistant_masks"], out["offset_mapping"], strict=True):
        if marked and inside:
            spans[-1] = (spans[-1][0], last)
        elif marked:
            spans.append((first, last))
        inside = bool(marked)
    if not spans:
        raise DataError(f"{place}: the chat template marks no text as the assistant's; check its generation marks.")
    return spans


def _specials(tokenizer: Any) -> tuple[str, ...]:
    """The text of every special token, any of which may end a turn."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*tokenizer.all_special_tokens, *added})


def _locate_answer(text: str, start: int, content: str, specials: tuple[str, ...]) -> tuple[int, str]:
    """Where the last answer begins in ``text`` and what it says, without the token that ends the turn."""
    found = text.find(content, start)
    if found >= 0:
        return found, content
    # The template rewrites the content (it may lay reasoning out anew): the answer is the turn as it stands.
    turn = text[start:]
    for special in specials:
        turn = turn.removesuffix(special)
    answer = turn.strip()
    return start + turn.index(answer), answer
