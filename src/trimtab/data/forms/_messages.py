"""The messages of a row as a chat template takes them, however they were written down."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from trimtab.data.forms import _form
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Row
from trimtab.errors import DataError

ROLES = {
    "assistant": ("gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bard", "bing"),
    "user": ("human", "prompter"),
    "system": ("developer",),
    "tool": ("function", "observation", "tool_response", "function_response", "ipython"),
}
"""Other names of a role. Those of the last two lines stay as they are where the template knows them itself."""

_MEANT = {other: role for role, others in ROLES.items() for other in (role, *others)}


@dataclass(frozen=True)
class Talk:
    """A conversation, and what goes to the chat template beside it."""

    messages: _form.Messages
    trained: frozenset[int]
    """The indices of the messages that carry loss."""
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] | None = None
    """``chat_template_kwargs`` of the row, such as ``enable_thinking``."""

    def upto(self, stop: int) -> Talk:
        """The first ``stop`` messages."""
        return Talk(self.messages[:stop], frozenset(at for at in self.trained if at < stop), self.tools, self.options)


def read_talk(row: Row, messages: Any, reading: Reading, *, key: str, context: int = 0) -> Talk:
    """The conversation of ``row``: ``messages``, which stand under ``key``, with its ``system`` and ``tools``.

    All assistant turns carry loss but those among the first ``context`` messages, and those that have ``weight: 0`` or
    ``train: false``.
    """
    said: _form.Messages = []
    trained = set()
    for number, message in enumerate(messages, start=1):
        place = f"{row.place}, message {number}"
        weight, one = _message(place, message, row, reading)
        if one["role"] == "assistant" and weight and number > context:
            trained.add(len(said))
        said.append(one)
    system = row.value.get("system")
    if system is not None and system != "":
        if not isinstance(system, str):
            raise DataError(f"{row.place}: 'system' must be a string, but is {_form.short(system)}.")
        _form.require_encodable(system, f"{row.place}: 'system'")
        if said and said[0]["role"] == "system":
            if said[0].get("content") != system:
                raise DataError(
                    f"{row.place}: 'system' and the first of '{key}' are two system texts; keep one of them."
                )
        else:
            said = [{"role": "system", "content": system}, *said]
            trained = {at + 1 for at in trained}
    return Talk(said, frozenset(trained), tools_of(row), options_of(row))


def _message(place: str, message: Any, row: Row, reading: Reading) -> tuple[int, dict[str, Any]]:
    """The weight of ``message``, 0 or 1, and what goes to the template."""
    if not isinstance(message, dict):
        raise DataError(
            f"{place}: must be an object with 'role' and 'content', but is {type(message).__name__} "
            f"{_form.short(message)}."
        )
    kept = {key: value for key, value in message.items() if value is not None}
    if "from" in kept and "role" not in kept:  # ShareGPT's names
        kept["role"] = kept.pop("from")
        if "content" not in kept and "value" in kept:
            kept["content"] = kept.pop("value")
    role = kept.get("role")
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{place}: 'role' must be a string, but is {_state(kept, 'role', message)}.")
    weight = _weight(place, kept)
    kept["role"] = _role(role, reading)
    if kept["role"] == "function_call":
        kept = {**kept, "role": "assistant", "content": "", "tool_calls": kept.get("content")}
    if isinstance(call := kept.get("function_call"), dict):  # OpenAI's first spelling
        del kept["function_call"]
        kept["tool_calls"] = [{"type": "function", "function": call}]
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(place, kept["tool_calls"])
        if not kept["tool_calls"]:
            del kept["tool_calls"]
    content = _content(place, kept, message, reading, row.place)
    if content is not None:
        kept["content"] = content
    return weight, kept


def _state(kept: dict[str, Any], key: str, message: dict[str, Any]) -> str:
    missing = "null" if key in message else "missing"
    state = f"{type(kept[key]).__name__} {_form.short(kept[key])}" if key in kept else missing
    return f"{state}; keys found: {', '.join(map(str, message)) or 'none'}"


def _content(place: str, kept: dict[str, Any], message: dict[str, Any], reading: Reading, row_place: str) -> str | None:
    """The text of a message. None if it has none and need not have one, since it is a call of tools."""
    content = kept.get("content")
    if content is None and kept.get("tool_calls"):
        return None
    if isinstance(content, list):
        content = "".join(_part(place, part) for part in content)
    elif isinstance(content, dict) and kept["role"] == "tool":
        content = json.dumps(content, ensure_ascii=False)
    elif not isinstance(content, str) and (number := _form.as_text(content)) is not None:
        reading.tell(row_place, "messages whose content is a number or a truth value, which is read as text")
        content = number
    if not isinstance(content, str):
        raise DataError(f"{place}: 'content' must be a string, but is {_state(kept, 'content', message)}.")
    _form.require_encodable(content, f"{place}: 'content'")
    if kept["role"] == "assistant":
        content = reading.split_end(content, row_place)[0]
    reading.look_for_ends(content, row_place)
    if kept["role"] == "assistant" and not content.strip() and not kept.get("tool_calls"):
        raise DataError(
            f"{place}: the assistant's content is empty, so there is nothing to learn; remove the turn or the row."
        )
    return content


def _part(place: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        kind, text = part.get("type", "text"), part.get("text")
        if kind in ("text", "input_text", "output_text") and isinstance(text, str):
            return text
        if kind != "text":
            raise DataError(f"{place}: its content has a part of the type {_form.short(kind)}; only text can be read.")
    raise DataError(
        f"{place}: each part of 'content' must be {{'type': 'text', 'text': ...}}, but one is {_form.short(part)}."
    )


def _role(role: str, reading: Reading) -> str:
    name = role.strip().lower()
    meant = _MEANT.get(name, role)
    if meant != name and meant in ("system", "tool") and reading.template.names(name):
        return name
    return meant


def _weight(place: str, message: dict[str, Any]) -> int:
    """Whether the message is to be trained, by its own ``weight`` or ``train``, which are taken out."""
    said = [read_weight(place, key, message.pop(key)) for key in ("weight", "train") if key in message]
    return min(said, default=1)


def read_weight(place: str, key: str, value: Any) -> int:
    """0 or 1, as a number, a truth value or text. Raises DataError for anything else."""
    text = value.strip().lower() if isinstance(value, str) else value
    if text in (0, 1, "0", "1", "0.0", "1.0", "false", "true"):
        return int(text in (1, "1", "1.0", "true"))
    raise DataError(
        f"{place}: '{key}' must be 0 (context only, not trained) or 1, but is {_form.short(value)}; give files weights "
        "in data.train, or name the column otherwise if it means something else."
    )


def _calls(place: str, calls: Any) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except ValueError:
            raise DataError(f"{place}: the call of a tool must be JSON, but is {_form.short(calls)}.") from None
    if isinstance(calls, dict):
        calls = [calls]
    named = isinstance(calls, list) and all(isinstance(call, dict) and isinstance(name_of(call), str) for call in calls)
    if not named:
        raise DataError(
            f"{place}: 'tool_calls' must be a list of objects like {{'type': 'function', 'function': {{'name': ..., "
            f"'arguments': ...}}}}, but is {_form.short(calls)}."
        )
    return list(calls)


def name_of(call: dict[str, Any]) -> Any:
    """The name of the function that is called; both layouts, with and without ``function``, are in use."""
    inner = call.get("function")
    return inner.get("name") if isinstance(inner, dict) else call.get("name")


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The row's tools, or the ``functions`` that it has in their place, in OpenAI's first spelling."""
    tools, functions = _schemas(row, "tools"), _schemas(row, "functions")
    if tools and functions:
        raise DataError(f"{row.place}: 'tools' and 'functions' are two lists of the same; keep one of them.")
    return tools or [{"type": "function", "function": function} for function in functions] or None


def unfolded(row: Row, key: str) -> Any:
    """What stands under ``key``; a list that is stored as JSON text, as tables need it, is read."""
    value = row.value.get(key)
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _schemas(row: Row, key: str) -> list[dict[str, Any]]:
    """The schemas under ``key``."""
    schemas = unfolded(row, key)
    if isinstance(schemas, str) and schemas.strip():
        raise DataError(f"{row.place}: '{key}' must be a list, but is {_form.short(schemas)}.")
    if not schemas:
        return []
    if not isinstance(schemas, list) or not all(isinstance(schema, dict) for schema in schemas):
        raise DataError(
            f"{row.place}: '{key}' must be a list of objects, each the schema of a function, but is "
            f"{type(schemas).__name__} {_form.short(schemas)}."
        )
    return schemas


def options_of(row: Row) -> dict[str, Any] | None:
    """The row's ``chat_template_kwargs``."""
    options = row.value.get("chat_template_kwargs")
    if options is None:
        return None
    if not isinstance(options, dict):
        raise DataError(f"{row.place}: 'chat_template_kwargs' must be an object, but is {_form.short(options)}.")
    return {key: value for key, value in options.items() if value is not None}
