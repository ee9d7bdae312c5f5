"""Tokens become text as they come, never half a character."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_PART = "\ufffd"  # what a tokenizer shows for a part of a character
_BEFORE = (8, 32, 128)
"""So many of the tokens before a text are looked at for how it goes on."""


class Detokenizer:
    """The text of tokens that come one after the other.

    Some decoders change a token's text by what stands before it (a space at the beginning is dropped), so new tokens
    are decoded together with some that were told before. A character of several bytes may be several tokens: it is told
    once it is whole.

    Args:
        silent: tokens that are no text, such as those that end an answer. Special tokens are none either.
        before: tokens whose text this one goes on from, without being told: a space at its beginning stays then.
    """

    def __init__(self, tokenizer: Any, silent: Collection[int] = (), before: Sequence[int] = ()) -> None:
        self.ids: list[int] = []
        self._tokenizer, self._silent = tokenizer, frozenset(silent)
        self._from, self._whole, self._told = 0, 0, 0
        for count in _BEFORE if before else ():  # as few as do not begin inside of a character
            self.ids = [*before[-count:]]
            if not (text := self._decoded(0)).startswith(_PART):
                self._whole, self._told = len(self.ids), len(text.rstrip(_PART))
                break
        else:
            self.ids = []

    @property
    def began(self) -> bool:
        """Whether there is any text before the next token's."""
        return self._told > 0

    def add(self, *ids: int) -> str:
        """The text that is sure now."""
        self.ids += ids
        return self._new(last=False)

    def finish(self) -> str:
        """What was held back, however it ends."""
        return self._new(last=True)

    def _new(self, *, last: bool) -> str:
        now = self._decoded(self._from)
        sure = now if last else now.rstrip(_PART)
        new = sure[self._told :]
        self._told = max(self._told, len(sure))
        if len(sure) == len(now):
            self._from, self._whole = self._whole, len(self.ids)
            self._told = len(self._decoded(self._from))
        return new

    def _decoded(self, start: int) -> str:
        ids = [one for one in self.ids[start:] if one not in self._silent]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def before_stops(text: str, stops: Collection[str], *, last: bool) -> tuple[int, bool]:
    """How much of ``text`` is sure to stand before all of ``stops``, and whether one of them is in it. What may become
    one is held back, unless nothing follows (``last``)."""
    found = min((at for at in map(text.find, stops) if at >= 0), default=None)
    if found is not None:
        return found, True
    return len(text) - (0 if last else _begun(text, stops)), False


def _begun(text: str, stops: Collection[str]) -> int:
    """The length of the longest end of ``text`` with which one of ``stops`` begins."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
