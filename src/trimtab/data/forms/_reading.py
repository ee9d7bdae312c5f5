"""What the rows of one reading share: the tokenizer, and what is to be told about them when all are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trimtab.data.forms._chat_template import ChatTemplate, special_tokens
from trimtab.models.chat_template import turn_end
from trimtab.notes import Notes

ENDS = (
    *("</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<eos>"),
    *("<|end|>", "<|return|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<turn|>", "<｜end▁of▁sentence｜>"),
)
"""How models in use write the end of an answer. Each counts only where the tokenizer has it as a special token."""

PROBES = 20
"""Rows on which it is tried what a chat template makes of a key, or of calls of tools."""


@dataclass
class _Rows:
    """Some rows: how many, and where the first and the last one stand."""

    first: str = ""
    last: str = ""
    count: int = 0

    def add(self, place: str) -> None:
        if place != self.last:
            self.first, self.last, self.count = self.first or place, place, self.count + 1


class Reading:
    """Passed from row to row, and closed after the last: then it has been told which keys are not used."""

    def __init__(self, tokenizer: Any, notes: Notes | None = None) -> None:
        self.tokenizer = tokenizer
        self.notes = notes if notes is not None else Notes()
        self._told: dict[str, str] = {}
        self._unused: dict[str, _Rows] = {}
        self._offered: dict[str, _Rows] = {}
        self._shown: set[str] = set()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exception: object) -> None:
        for what, keys in (
            ("keys that are not used", self._unused),
            ("keys that the chat template does not show", self._offered),
        ):
            if keys:
                listed = ", ".join(f"{key} ({rows.count:,} row{'s' * (rows.count > 1)})" for key, rows in keys.items())
                self.notes.add(f"{what}: {listed}; the first row is {next(iter(keys.values())).first}")

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer)

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The texts that mark the end of an answer for this tokenizer."""
        if self.tokenizer is None:
            return ()
        known = set(special_tokens(self.tokenizer))
        turn, own = turn_end(self.tokenizer), getattr(self.tokenizer, "eos_token", None)
        ends = (own, turn.text if turn is not None else None, *ENDS)
        return tuple(dict.fromkeys(end for end in ends if end and (end == own or end in known)))

    def split_end(self, text: str, place: str) -> tuple[str, str]:
        """``text`` without the end tokens that stand at its end, and the first of them; told where there is one."""
        rest, end = text.rstrip(), ""
        while found := next((one for one in self.ends if rest.endswith(one)), None):
            rest, end = rest.removesuffix(found).rstrip(), found
        if not end:
            return text, ""
        self.tell(place, "answers that end with an end token of their own, which is not put there twice")
        return rest, end

    def look_for_ends(self, text: str, place: str) -> None:
        """Tell of an end token within ``text``: the model would learn to go on where answers end."""
        if end := next((end for end in self.ends if end in text), None):
            self.tell(place, f"messages and answers with the end token {end} in the middle, which is read as an end")

    def tell(self, place: str, what: str, advice: str = "") -> None:
        """A fact about the row at ``place``, as `Notes.row` has it. Told twice of one row, it counts once."""
        if self._told.get(what) != place:
            self._told[what] = place
            self.notes.row(place, what, advice)

    def unused(self, key: str, place: str) -> None:
        """The row at ``place`` has something under ``key``, and nothing is made of it."""
        self._unused.setdefault(key, _Rows()).add(place)

    def offer(self, key: str, place: str, differs: Callable[[], bool]) -> None:
        """The row at ``place`` hands ``key`` to the chat template; ``differs`` says whether the text would be another
        one without it."""
        if key in self._shown:
            return
        rows = self._offered.setdefault(key, _Rows())
        rows.add(place)
        if rows.count <= PROBES and differs():
            self._shown.add(key)
            del self._offered[key]
