"""Calls of tools in what a model writes: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes, Qwen
and SmolLM write them. Whatever is not exactly such a call, of a tool that was offered, stays text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A call: the tool's name, and its arguments as JSON."""

    name: str
    arguments: str


class CallFinder:
    """Divides a text that comes in pieces into what is said and what is called."""

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        self._names = {tool["function"]["name"] for tool in tools}
        self._held = ""
        self.found = False
        """Whether there was any call."""

    def feed(self, text: str, *, last: bool = False) -> list[str | ToolCall]:
        """What is sure now, in its order. ``last``: nothing follows."""
        self._held += text
        said: list[str | ToolCall] = []
        while self._held:
            start = self._held.find(_OPEN)
            if start < 0:
                # The end of what came may be the beginning of the mark.
                kept = 0 if last else _begun(self._held)
                said.append(self._held[: len(self._held) - kept])
                self._held = self._held[len(self._held) - kept :]
                break
            end = self._held.find(_CLOSE, start)
            if end < 0 and not last:
                said.append(self._held[:start])
                self._held = self._held[start:]
                break
            # A model that ends its turn inside of the mark has called all the same, if the JSON is whole.
            inside = self._held[start + len(_OPEN) : end if end >= 0 else len(self._held)]
            after = end + len(_CLOSE) if end >= 0 else len(self._held)
            call = self._call(inside)
            said += [self._held[:start], call] if call else [self._held[:after]]
            self._held = self._held[after:]
        if self.found:  # lines between and around calls are of the form, and nobody's words
            said = [one for one in said if not isinstance(one, str) or one.strip()]
        return [one for one in said if one]

    def _call(self, text: str) -> ToolCall | None:
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name = said.get("name") if isinstance(said, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = said.get("arguments", said.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments) if _is_json(arguments) else None
        if not isinstance(arguments, dict):
            return None
        self.found = True
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _begun(text: str) -> int:
    """How many letters at the end of ``text`` may be the beginning of the opening mark."""
    return next((size for size in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:size])), 0)
