"""A tokenizer's chat template: rendering, and what is learnt about it once by rendering a word or two."""

from __future__ import annotations

import re
from functools import cached_property
from itertools import zip_longest
from typing import Any

from trimtab.errors import DataError, ModelError
from trimtab.models.chat_template import render

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WORD = "abracadabra"


class ChatTemplate:
    """The chat template of ``tokenizer``, which has to have one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.specials = special_tokens(tokenizer)
        """Any of these may end a turn."""

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
            return str(render(self.tokenizer, messages, tools=tools, add_generation_prompt=generation, **said))
        except (ModelError, TypeError) as error:  # options can have the names of parameters
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(
                f"{place}: {error} (roles: {roles or 'none'}). Change the row to what the template allows, or use "
                "prompt/completion rows."
            ) from None

    def marked(self, tools: list[dict[str, Any]] | None = None) -> bool:
        """Whether the template marks the assistant's text itself (``{% generation %}``)."""
        return _GENERATION.search(self.tokenizer.get_chat_template(tools=tools)) is not None

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
    def opening(self) -> str:
        """What stands before every assistant turn; empty if that is not the same everywhere."""
        return self._marks[0]

    @cached_property
    def closing(self) -> str:
        """What ends an assistant turn, without white space; empty if nothing does."""
        return self._marks[1]

    @cached_property
    def _marks(self) -> tuple[str, str]:
        question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": _WORD}
        before, prompt = self._try([question]), self._try([question], generation=True)
        turn = self._try([question, answer])
        if turn is None or _WORD not in turn:
            return "", ""
        closing = turn[turn.rfind(_WORD) + len(_WORD) :].strip()
        if before is None or prompt is None or not (prompt.startswith(before) and turn.startswith(before)):
            return "", closing
        header = turn[len(before) : turn.rfind(_WORD)]
        pairs = zip_longest(prompt[len(before) :], header)
        same = next((at for at, (one, other) in enumerate(pairs) if one != other), len(header))
        return header[:same], closing

    def shows(self, key: str) -> bool:
        """Whether the last assistant turn shows what it has under ``key``."""
        if key not in self._shows:
            answer = {"role": "assistant", "content": "x", key: _WORD}
            self._shows[key] = _WORD in (self._try([{"role": "user", "content": "x"}, answer]) or "")
        return self._shows[key]

    @cached_property
    def _shows(self) -> dict[str, bool]:
        return {}

    def _try(self, messages: list[dict[str, Any]], *, generation: bool = False) -> str | None:
        try:
            return self.render(messages, "", generation=generation)
        except DataError:
            return None


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of all special tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*tokenizer.all_special_tokens, *added})
