"""A tokenizer's chat template: rendering, and what is learnt about it once by rendering a word or two."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from trimtab.errors import DataError, ModelError
from trimtab.models.chat_template import render

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WORD = "abracadabra"


class ChatTemplate:
    """The chat template of ``tokenizer``, which has to have one. ``limit_memory``: as ``render`` has it."""

    def __init__(self, tokenizer: Any, *, limit_memory: bool = True) -> None:
        self.tokenizer = tokenizer
        self._limit_memory = limit_memory
        self.specials = special_tokens(tokenizer)
        """Any of these may end a turn."""
        self.calls_written = 0
        """Conversations with calls of tools that it was seen to write."""
        self._marked: dict[bool, bool] = {}
        self._shows: dict[str | None, bool] = {}
        longest_first = sorted(self.specials, key=len, reverse=True)
        self.mark = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        """Finds a special token."""

    def render(
        self,
        messages: list[dict[str, Any]],
        place: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        options: dict[str, Any] | None = None,
        generation: bool = False,
    ) -> str:
        """The text of ``messages``. Raises DataError, which names ``place``, if the template refuses them."""
        said = options or {}
        try:
            taken, limited = self.taken(messages), self._limit_memory
            asked: dict[str, Any] = {"tools": tools, "add_generation_prompt": generation}
            return str(render(self.tokenizer, taken, limit_memory=limited, **asked, **said))
        except (ModelError, TypeError) as error:  # options can have the names of parameters
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(
                f"{place}: {error} (roles: {roles or 'none'}). Change the row to what the template allows, or use "
                "prompt/completion rows."
            ) from None

    def marked(self, tools: list[dict[str, Any]] | None = None) -> bool:
        """Whether the template marks the assistant's text itself (``{% generation %}``)."""
        if (with_tools := bool(tools)) not in self._marked:
            found = _GENERATION.search(self.tokenizer.get_chat_template(tools=tools))
            self._marked[with_tools] = found is not None
        return self._marked[with_tools]

    def names(self, word: str) -> bool:
        """Whether the template has ``word`` in quotes."""
        templates = self.tokenizer.chat_template
        texts = templates.values() if isinstance(templates, dict) else [templates]
        return any(f"'{word}'" in text or f'"{word}"' in text for text in texts if text)

    @cached_property
    def takes_system(self) -> bool:
        """Whether a conversation may begin with a system message."""
        question = {"role": "user", "content": _WORD}
        return self._try([question]) is None or self._try([{"role": "system", "content": "x"}, question]) is not None

    def folded(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``messages``, with the text of a leading system message at the beginning of the first user message where the
        template takes no system message."""
        leading = len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user"
        if not leading or self.takes_system:
            return messages
        system, first, *rest = messages
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    @cached_property
    def closing(self) -> str:
        """What ends the last assistant turn: its special tokens up to any white space, or all there is if it has none;
        empty if nothing ends it."""
        rest = self._turn.rpartition(_WORD)[2].strip()
        end = 0
        while found := self.mark.match(rest, end):
            end = found.end()
        return rest[:end] if end else rest

    @cached_property
    def opening(self) -> str:
        """What stands before every assistant turn; empty if that is not the same everywhere."""
        question, turn = [{"role": "user", "content": "x"}], self._turn
        before, prompt = self._try(question), self._try(question, generation=True)
        if before is None or prompt is None or not turn:
            return ""
        # Some templates end what is no prompt with an end token (Phi-3).
        base = same_start(before, same_start(prompt, turn))
        return same_start(prompt, turn[: turn.rfind(_WORD)])[len(base) :]

    def taken(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``messages`` with their content as this template takes it."""
        return _as_parts(messages) if self._wants_parts else messages

    @cached_property
    def _turn(self) -> str:
        """A question, and a word that answers it; empty if the template cannot render them."""
        turn = self._try([{"role": "user", "content": "x"}, {"role": "assistant", "content": _WORD}]) or ""
        return turn if _WORD in turn else ""

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether content is left out unless it is a list of parts, as in templates of models that see images."""
        whole = [{"role": "user", "content": _WORD}]
        shown = [self._shown(whole), self._shown(_as_parts(whole))]
        return _WORD not in shown[0] and _WORD in shown[1]

    def _shown(self, messages: list[dict[str, Any]]) -> str:
        try:
            return str(render(self.tokenizer, messages, limit_memory=self._limit_memory))
        except ModelError:
            return ""

    def shows(self, key: str | None) -> bool:
        """Whether the last assistant turn shows the thoughts that it has under ``key``; None: in its content."""
        if key not in self._shows:
            thought = {"content": f"<think>\n{_WORD}\n</think>\n\nx"} if key is None else {"content": "x", key: _WORD}
            talk = [{"role": "user", "content": "x"}, {"role": "assistant", **thought}]
            self._shows[key] = _WORD in (self._try(talk) or "")
        return self._shows[key]

    def _try(self, messages: list[dict[str, Any]], *, generation: bool = False) -> str | None:
        try:
            return self.render(messages, "", generation=generation)
        except DataError:
            return None


def same_start(one: str, other: str) -> str:
    """The text with which both begin; marks such as ``<|end|>`` are not cut."""
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:at] if at in (len(one), len(other)) else one[:at].rstrip("<|\uff5c")


def _as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if message.get("content") else message
        for message in messages
    ]


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of all special tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*tokenizer.all_special_tokens, *added})
