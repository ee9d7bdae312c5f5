"""Renders a conversation by its chat template, and finds the assistant's turns in the text.

If the template marks them itself (``{% generation %}``), its marks are used. If the same words stand before and after
every assistant turn, and nowhere else, one rendering is enough. If not, the messages before a turn are rendered alone:
if the whole text begins with the result, the turn starts at its end.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from trimtab.data.forms import _form
from trimtab.data.forms._chat_template import ChatTemplate, same_start
from trimtab.data.forms._messages import ROLES, Talk, name_of
from trimtab.data.forms._reading import PROBES, Reading
from trimtab.data.rows import Example, Row
from trimtab.errors import DataError
from trimtab.models.chat_template import render

Span = tuple[int, int]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which rows keep what was thought before an answer."""

_THOUGHT = re.compile(r"(?s)<think>(.*?)</think>")
_WORDS = re.compile(r"\w+(?:[ ,.]+\w+){0,3}")
_OWN = {"role", "content", "tool_calls"}


def follow(talk: Talk, row: Row, reading: Reading) -> Example | None:
    """The text of ``talk``, its trained turns, each with the token that ends it, and its last answer.

    Messages after the last trained turn carry no loss and are left out, as is white space after that turn. Raises
    DataError if the template refuses the messages, or if a turn cannot be located in the text.
    """
    if not talk.trained:
        reading.tell(row.place, "rows left out, since none of their turns is to be trained")
        return None
    template = reading.template
    if len(talk.messages) > (end := max(talk.trained) + 1):
        reading.tell(row.place, "rows whose messages after the last turn that is trained are left out")
    talk = talk.upto(end)
    folded = template.folded(talk.messages)
    if (fewer := len(talk.messages) - len(folded)) > 0:
        what = "system texts put at the beginning of the first user message, since the chat template takes no other"
        reading.tell(row.place, what)
        talk = replace(talk, messages=folded, trained=frozenset(at - fewer for at in talk.trained))
    talk, text = _rendered(talk, template, row.place)
    _form.require_encodable(text, f"{row.place}: the text of its messages")
    _look_for_what_is_dropped(talk, text, reading, row.place)
    spans = _spans(talk, text, template, row.place)
    last = len(talk.messages) - 1
    for index, (start, stop) in spans.items():
        # White space that a template puts after an end token is no part of the turn.
        turn = text[start:stop].rstrip()
        if turn.endswith(template.specials):
            spans[index] = (start, start + len(turn))
    trained = []
    for index in sorted(talk.trained):
        start, stop = spans[index]
        thought, key = _thought(talk.messages[index])
        if thought and thought not in text[start:stop]:
            if index < last and template.shows(key):
                what = (
                    "earlier answers that are context only, since the chat template drops the thoughts before them "
                    "once another question follows"
                )
                reading.tell(row.place, what, "To train such an answer, give it a row of its own that ends with it")
                continue
            if key is None:
                reading.tell(row.place, "thoughts (<think>) that the chat template leaves out")
        trained.append((start, stop))
    start, stop = spans[last]
    text = text[:stop]
    begin, answer = _locate_answer(text, start, talk.messages[last], template.specials)
    return Example(
        source=row.source,
        number=row.number,
        text=text,
        trained=tuple(trained),
        prompt=text[:begin],
        answer=answer,
        ends=not text.endswith(template.specials),
    )


def _render(talk: Talk, template: ChatTemplate, place: str, *, generation: bool = False) -> str:
    return template.render(talk.messages, place, tools=talk.tools, options=talk.options, generation=generation)


def _rendered(talk: Talk, template: ChatTemplate, place: str) -> tuple[Talk, str]:
    """``talk`` as this template takes it, and its text.

    Templates differ in what they expect of a call of tools: no content, an empty one, or none at all; arguments as an
    object or as JSON text. What the row has is tried first.
    """
    calls = [call for message in talk.messages for call in message.get("tool_calls", ())]
    if not calls:
        return talk, _render(talk, template, place)
    elsewhere = _without_calls(talk, template, place) if template.calls_written < PROBES else ""
    called = Counter(map(name_of, calls))
    refused: list[DataError] = []
    written = False
    for variant in _variants(talk):
        try:
            text = _render(variant, template, place)
        except DataError as error:
            refused.append(error)
            continue
        names = all(text.count(name) >= elsewhere.count(name) + count for name, count in called.items())
        if names and all(_arguments_stand(call, text) for call in calls):
            template.calls_written += 1
            return variant, text
        written = True
    if not written:
        raise refused[1]  # the template's own words about an empty content, rather than about none
    raise DataError(
        f"{place}: the chat template does not write the call of '{name_of(calls[0])}', so it could not be learnt; use "
        "a model whose template knows tools, give model.chat_template, or write the call into the content."
    )


def _variants(talk: Talk) -> Iterator[Talk]:
    for arguments in (None, json.loads, lambda value: json.dumps(value, ensure_ascii=False)):
        for empty in (None, "", ...):
            yield replace(talk, messages=[_varied(message, arguments, empty) for message in talk.messages])


def _varied(message: dict[str, Any], arguments: Any, empty: Any) -> dict[str, Any]:
    """``message`` with its ``arguments`` put in another way, and an ``empty`` content in place of none."""
    if message["role"] != "assistant" or (message.get("content") and "tool_calls" not in message):
        return message
    out = dict(message)
    if empty is not None and not out.get("content"):
        out.pop("content", None)
        if empty is not ...:
            out["content"] = empty
    if arguments is not None and "tool_calls" in message:
        out["tool_calls"] = [_with_arguments(call, arguments) for call in message["tool_calls"]]
    return out


def _with_arguments(call: dict[str, Any], change: Any) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], change)}
    value = call.get("arguments")
    if isinstance(value, str) is (change is json.loads) and value is not None:
        try:
            return {**call, "arguments": change(value)}
        except ValueError:
            return call
    return call


def _without_calls(talk: Talk, template: ChatTemplate, place: str) -> str:
    """The text of ``talk`` without its calls, where the names of functions stand among the tools; empty if the template
    cannot render that."""
    bare = [_varied(_without(message, "tool_calls"), None, "") for message in talk.messages]
    try:
        return _render(replace(talk, messages=bare), template, place)
    except DataError:
        return ""


def _arguments_stand(call: dict[str, Any], text: str) -> bool:
    """Whether the arguments in ``text`` are neither JSON in quotes nor Python's own."""
    inner = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        return '"' not in arguments or arguments in text or json.dumps(arguments)[1:-1] not in text
    return not isinstance(arguments, dict) or not arguments or str(arguments) not in text


def _look_for_what_is_dropped(talk: Talk, text: str, reading: Reading, place: str) -> None:
    """Tell what of ``talk`` is not in its ``text``: whole messages, and keys that the template does not show."""
    for index, message in enumerate(talk.messages):
        role, content = message["role"], message.get("content") or ""
        words = _WORDS.search(content) if role != "assistant" and content.strip() not in text else None
        if words is not None and words[0].casefold() not in text.casefold():
            if role not in ROLES:
                raise DataError(
                    f"{place}, message {index + 1}: the chat template leaves out what the role '{role}' says; use "
                    f"{', '.join(ROLES)}."
                )
            reading.tell(place, f"messages of the role '{role}' that the chat template leaves out")
    for what, others in with_less(talk.messages):
        _offer(what, replace(talk, messages=others), text, reading, place)
    if talk.tools:
        _offer("'tools'", replace(talk, tools=None), text, reading, place)
    if talk.options:
        _offer("'chat_template_kwargs'", replace(talk, options=None), text, reading, place)


def with_less(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What messages hold beside their role, their content and calls of tools, in words, and the messages without it.
    A template may show it with some roles and leave it out with others."""
    held = {
        (message.get("role"), key): None
        for message in messages
        for key, value in message.items()
        if key not in _OWN and value is not None
    }
    for role, key in held:
        less = [_without(message, key) if message.get("role") == role else message for message in messages]
        yield f"'{key}' of messages of the role '{role}'", less


def _without(message: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != key}


def _offer(what: str, without: Talk, text: str, reading: Reading, place: str) -> None:
    def differs() -> bool:
        try:
            return _render(without, reading.template, place) != text
        except DataError:
            return True

    reading.offer(what, place, differs)


def _spans(talk: Talk, text: str, template: ChatTemplate, place: str) -> dict[int, Span]:
    """The start and end of every trained turn in ``text``, each after its header and with its end mark."""
    turns = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if template.marked(talk.tools):
        spans = _marked_spans(talk, template, place)
        if len(spans) != len(turns):
            raise DataError(
                f"{place}: the chat template marks {len(spans)} parts of its text as the assistant's, and the row has "
                f"{len(turns)} assistant turns; check its generation marks."
            )
        return dict(zip(turns, spans, strict=True))
    return _by_marks(talk, turns, text, template) or {
        index: _find_turn(talk, index, text, template, place) for index in sorted(talk.trained)
    }


def _by_marks(talk: Talk, turns: list[int], text: str, template: ChatTemplate) -> dict[int, Span] | None:
    """All turns by what stands before and after each; None if these words stand elsewhere, too, or not everywhere."""
    # A prompt may open the thoughts of a new turn; past turns may have none.
    header = template.opening.partition("<think>")[0]
    closing, thoughts = template.closing, template.opening[len(header) :]
    if not header.strip() or not closing or text.count(header) != len(turns):
        return None
    starts = [found.end() for found in re.finditer(re.escape(header), text)]
    spans: dict[int, Span] = {}
    for index, start, following in zip(turns, starts, [*starts[1:], len(text) + len(header)], strict=True):
        if text.startswith(thoughts, start):
            start += len(thoughts)
        stop = text.find(closing, start, following - len(header))
        said, turn = _said(talk.messages[index]), text[start : max(start, stop)].rstrip()
        if stop < 0 or not (said in turn if "tool_calls" in talk.messages[index] else turn.endswith(said)):
            return None
        spans[index] = (start, stop + len(closing))
    return spans


def _said(message: dict[str, Any]) -> str:
    """What an assistant turn says after its thoughts."""
    return (message.get("content") or "").rpartition("</think>")[2].strip()


def _find_turn(talk: Talk, index: int, text: str, template: ChatTemplate, place: str) -> Span:
    before = _render(talk.upto(index), template, place, generation=True) if index else ""
    start = len(before)
    if not text.startswith(before):
        # Some templates open a new turn with more than a past turn has ("<think>"): the turn starts where they differ,
        # or at a mark that begins there.
        if not text.startswith(_render(talk.upto(index), template, place)):
            raise _lost(place, index, "what comes before it is rendered in another way once it is there")
        start = len(same_start(text, before))
    through = _render(talk.upto(index + 1), template, place).rstrip()
    if text.startswith(through) and len(through) > start:
        return start, len(through)
    # Some templates render the last turn differently from a past one (Qwen3 puts empty reasoning before it). Both end
    # in the same way, so we search for what is said last in it together with that ending.
    calls = talk.messages[index].get("tool_calls")
    said = name_of(calls[-1]) if calls else _said(talk.messages[index])
    if not said or said not in through:
        raise _lost(place, index, "its content is changed")
    ending = through[through.rfind(said) + len(said) :]
    begin = text.find(said + ending, start)
    if begin >= 0:
        return start, begin + len(said + ending)
    # Or they end differently (gpt-oss, Phi-3): the turn ends with the first special token after what is said.
    begin = text.find(said, start)
    end = template.mark.search(text, begin + len(said)) if begin >= 0 else None
    if end is None or (text[begin + len(said) : end.start()].strip() and not calls):
        raise _lost(place, index, "its content is changed, or left out, once another turn follows")
    return start, end.end()


def _lost(place: str, index: int, reason: str) -> DataError:
    return DataError(
        f"{place}, message {index + 1}: the chat template cannot be followed, so it is unknown where in its text this "
        f"assistant turn is: {reason}. Give each row one assistant turn, at its end; or use a template with "
        "{% generation %} marks; or turn the rows into prompt/completion."
    )


def _marked_spans(talk: Talk, template: ChatTemplate, place: str) -> list[Span]:
    """The character spans that a template with ``{% generation %}`` marks."""
    from itertools import groupby

    out = render(
        template.tokenizer,
        template.taken(talk.messages),
        tools=talk.tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **(talk.options or {}),
    )
    tokens = zip(out["assistant_masks"], out["offset_mapping"], strict=True)
    runs = [[offsets for _, offsets in run] for marked, run in groupby(tokens, key=lambda token: token[0]) if marked]
    spans = [(run[0][0], run[-1][1]) for run in runs]
    if not spans:
        raise DataError(f"{place}: the chat template marks no text as the assistant's; check its generation marks.")
    return spans


def _thought(message: dict[str, Any]) -> tuple[str, str | None]:
    """What was thought before an answer, and the key that has it; the key is None if the content has it."""
    for key in THOUGHTS:
        if isinstance(thought := message.get(key), str) and thought.strip():
            return thought.strip(), key
    inside = _THOUGHT.search(message.get("content") or "")
    return (inside[1].strip(), None) if inside else ("", None)


def _locate_answer(text: str, start: int, message: dict[str, Any], specials: tuple[str, ...]) -> tuple[int, str]:
    """The start of the last answer in ``text``, and the answer itself without the token that ends the turn."""
    content = (message.get("content") or "").strip()
    begin = text.find(content, start)
    thought, key = _thought(message)
    if begin >= 0 and content and "tool_calls" not in message and not (key and thought in text[start:]):
        return begin, content
    # The answer is more than the content, or the template changed it: it is then the turn as rendered.
    turn = text[start:].rstrip()
    while special := next((one for one in specials if turn.endswith(one)), None):
        turn = turn.removesuffix(special).rstrip()
    answer = turn.strip()
    return start + turn.index(answer), answer
