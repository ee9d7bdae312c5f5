"""Conversations, ``{"messages": [{"role": ..., "content": ...}, ...]}``, rendered by the tokenizer's chat template.

The assistant's turns carry loss, their calls of tools among them; with ``weight: 0`` or ``train: false`` a turn is
context only. ``tools``, ``system`` and ``chat_template_kwargs`` of the row, and all else that a message has
(``tool_calls``, ``reasoning_content``, ``name``, ...), go to the template. A template that takes no system message gets
its text at the beginning of the first user message. With ``data.form: chat``, rows of the forms with a question and an
answer are put into the chat template, too.
"""

from __future__ import annotations

from typing import Any, ClassVar

from trimtab.data.forms import _form, _turns
from trimtab.data.forms._chat_template import ChatTemplate
from trimtab.data.forms._messages import Talk, options_of, read_talk, tools_of, unfolded
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Example, Row
from trimtab.errors import DataError


class Chat(_form.Form):
    """Messages; the assistant's turns carry loss."""

    keys: ClassVar[tuple[str, ...]] = ("messages",)
    optional = ("system", "tools", "functions", "chat_template_kwargs")
    precedence = 6
    has_template = True

    def check(self, tokenizer: Any, place: str) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(
                f"{place}: the row is a conversation, but the tokenizer {_name(tokenizer)} has no chat template; use a "
                "model that was tuned for chat, name a template in model.chat_template (chatml, a file), or turn the "
                "rows into prompt/completion."
            )

    def talk(self, row: Row, reading: Reading) -> Talk:
        """The row's conversation."""
        key = self.keys[0]
        messages = unfolded(row, key)
        if not isinstance(messages, list):
            raise DataError(f"{row.place}: {self.expected(row, key, 'a list')}")
        return read_talk(row, messages, reading, key=key)

    def messages(self, row: Row, reading: Reading) -> _form.Messages:
        return self.talk(row, reading).messages

    def example(self, row: Row, reading: Reading) -> Example | None:
        talk = self.talk(row, reading)
        if not any(message["role"] == "assistant" for message in talk.messages):
            roles = ", ".join(message["role"] for message in talk.messages) or "none"
            raise DataError(
                f"{row.place}: no message has the role 'assistant', so there is nothing to learn (roles: {roles})."
            )
        return _turns.follow(talk, row, reading)

    def prompt(self, text: str, tokenizer: Any, *, system: str = "") -> str:
        if not tokenizer.chat_template:
            raise DataError(f"{_name(tokenizer)}: the tokenizer has no chat template; use --plain")
        said = [{"role": "system", "content": system}] if system else []
        return self.render([*said, {"role": "user", "content": text}], tokenizer)

    def render(self, messages: _form.Messages, tokenizer: Any, row: Row | None = None) -> str:
        """The text after which the model writes its answer to ``messages``, those of ``row`` with its tools."""
        template = ChatTemplate(tokenizer)
        beside: dict[str, Any] = {} if row is None else {"tools": tools_of(row), "options": options_of(row)}
        return template.render(template.folded(messages), "the conversation", generation=True, **beside)


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
