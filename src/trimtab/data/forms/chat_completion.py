"""TRL's rows, ``{"prompt": [messages], "completion": [messages]}``: the assistant's turns of the completion carry loss.

One of the two may be a string, which is what the user, or the assistant, says. All else is as in ``chat``.
"""

from __future__ import annotations

from typing import Any

from trimtab.data.forms._messages import Talk, read_talk
from trimtab.data.forms._reading import Reading
from trimtab.data.forms.chat import Chat
from trimtab.data.rows import Row
from trimtab.errors import DataError


class ChatCompletion(Chat):
    """A conversation, and how it goes on."""

    keys = ("prompt", "completion")
    precedence = 2

    def fits(self, row: Row) -> bool:
        return super().fits(row) and any(isinstance(row.value[key], list) for key in self.keys)

    def talk(self, row: Row, reading: Reading) -> Talk:
        prompt, completion = (
            self._messages(row, key, role) for key, role in zip(self.keys, ("user", "assistant"), strict=True)
        )
        if completion[: len(prompt)] == prompt:  # some tables repeat the prompt in what follows it
            completion = completion[len(prompt) :]
        return read_talk(row, [*prompt, *completion], reading, key="prompt", context=len(prompt))

    def _messages(self, row: Row, key: str, role: str) -> list[Any]:
        value = row.value.get(key)
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        if not isinstance(value, list):
            raise DataError(f"{row.place}: {self.expected(row, key, 'a list of messages')}")
        return value
