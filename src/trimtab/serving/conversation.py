"""The messages of a chat request become the text that the model goes on from, by the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from trimtab.data.forms._chat_template import ChatTemplate
from trimtab.errors import ModelError
from trimtab.models.chat_template import is_in, render
from trimtab.serving.bodies import ChatAsking, FieldError

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_LOOKED_AT = 4  # of the system messages
_SETTLED = frozenset(
    {
        *(
            "tokenizer",
            "messages",
            "conversation",
            "tools",
            "documents",
            "chat_template",
            "add_generation_prompt",
            "tokenize",
        ),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "limit_memory"),
    }
)
"""What ``chat_template_kwargs`` may not say: it is settled by the server, or is no variable of the template."""


class Conversations:
    """Writes conversations for the models of one server; what is learnt about a template is kept.

    Templates have no bound of their memory here: it would be one of the whole process, and the engine works beside it.
    """

    def __init__(self) -> None:
        self._templates: dict[str, ChatTemplate] = {}

    def text(self, asked: ChatAsking, tokenizer: Any) -> str:
        """The prompt of ``asked``. Raises FieldError for messages that are none, or that the template refuses."""
        if not getattr(tokenizer, "chat_template", None):
            raise FieldError(
                f"{asked.model}: this model has no chat template, so it is unknown how it is talked to; ask it by "
                "/v1/completions, as its training rows did",
                "messages",
            )
        template = self._templates.get(asked.model)
        if template is None or template.tokenizer is not tokenizer:
            template = self._templates[asked.model] = ChatTemplate(tokenizer, limit_memory=False)
        messages = [_message(at, message, template) for at, message in enumerate(asked.messages)]
        if not messages:
            raise FieldError("messages: expected at least one message", "messages")
        messages = template.taken(template.folded(messages))
        tools = _tools(asked)
        text = _rendered(tokenizer, messages, asked, tools)
        if tools and text == _rendered(tokenizer, messages, asked, None):
            raise FieldError(f"tools: the chat template of {asked.model} has no place for tools", "tools")
        for at, what, without in _doubtful(messages, text):
            try:
                same = _rendered(tokenizer, without, asked, tools) == text
            except FieldError:
                continue
            if same:
                raise FieldError(
                    f"messages.{at}: the chat template of {asked.model} leaves {what} out here, so the model would not "
                    "read this; say it in a message of the user",
                    "messages",
                )
        return text


def _doubtful(messages: list[dict[str, Any]], text: str) -> Iterator[tuple[int, str, list[dict[str, Any]]]]:
    """What some templates leave out and is not in ``text``, where it stands, and the messages without it."""
    said = [(at, one) for at, one in enumerate(messages) if one.get("content")]
    systems = [at for at, one in said if one["role"] == "system"]
    results = [at for at, one in said if one["role"] == "tool"]
    for at in systems[:_LOOKED_AT] + results[:1]:
        if is_in(str(messages[at]["content"]), text):
            continue
        yield at, f"messages of the role '{messages[at]['role']}'", [*messages[:at], *messages[at + 1 :]]
    for at in [at for at, one in enumerate(messages) if one.get("tool_calls")][:1]:
        bare = {key: value for key, value in messages[at].items() if key != "tool_calls"}
        yield at, "calls of tools", [*messages[:at], {"content": "", **bare}, *messages[at + 1 :]]


def _rendered(
    tokenizer: Any, messages: list[dict[str, Any]], asked: ChatAsking, tools: list[dict[str, Any]] | None
) -> str:
    options = asked.chat_template_kwargs or {}
    if settled := sorted(_SETTLED & options.keys()):
        raise FieldError(f"chat_template_kwargs: {settled[0]} is not for a request to set", "chat_template_kwargs")
    try:
        return str(render(tokenizer, messages, limit_memory=False, tools=tools, add_generation_prompt=True, **options))
    except ModelError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise FieldError(f"messages: {error} (roles: {roles})", "messages") from None


def _message(at: int, message: dict[str, Any], template: ChatTemplate) -> dict[str, Any]:
    place = f"messages.{at}"
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if role not in _ROLES:
        raise FieldError(f"{place}.role: expected one of {', '.join(_ROLES)}, got {str(role)[:80]}", "messages")
    if role == "developer" and not template.names(role):
        kept["role"] = "system"
    if role == "function" and not template.names(role):
        kept["role"] = "tool"
    if calls := kept.pop("tool_calls", None):
        if not isinstance(calls, list):
            raise FieldError(f"{place}.tool_calls: expected a list of calls", "messages")
        kept["tool_calls"] = [_call(f"{place}.tool_calls.{number}", call) for number, call in enumerate(calls)]
    if "content" in kept or not calls:
        kept["content"] = _content(f"{place}.content", kept.get("content"))
    return kept


def _content(place: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FieldError(f"{place}: expected text, or a list of parts of text", "messages")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text"):
            raise FieldError(f"{place}.{number}: only text can be read, and this is {str(kind)[:80]}", "messages")
        if not isinstance(text, str):
            raise FieldError(f"{place}.{number}: expected {{'type': 'text', 'text': ...}}", "messages")
        texts.append(text)
    return "".join(texts)


def _call(place: str, call: Any) -> dict[str, Any]:
    """A call of a tool; its arguments are an object for templates, and JSON in a text for OpenAI's clients."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(
            f"{place}: expected {{'type': 'function', 'function': {{'name': ..., 'arguments': ...}}}}", "messages"
        )
    said = function.get("arguments")
    try:
        arguments = json.loads(said) if isinstance(said, str) and said.strip() else said or {}
    except (ValueError, RecursionError):
        raise FieldError(f"{place}.function.arguments: expected JSON", "messages") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(asked: ChatAsking) -> list[dict[str, Any]] | None:
    """The tools that the template is told of."""
    if asked.tool_choice not in (None, "auto", "none"):
        raise FieldError(
            "tool_choice: the model cannot be made to call a tool here; expected 'auto' or 'none'", "tool_choice"
        )
    for number, tool in enumerate(asked.tools or ()):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise FieldError(
                f"tools.{number}: expected {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}",
                "tools",
            )
    return asked.tools if asked.tools and asked.tool_choice != "none" else None
