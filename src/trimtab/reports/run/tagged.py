"""A text whose words have tags, in pieces that a page can colour: each run of words under one tag or entity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

COLOURS = 6
"""Pairs of ink and ground that the style sheet has, ``tag-0`` and on."""

_BEGIN, _INSIDE, _OUTSIDE = "BSU", "IEL", "O"


class Piece(NamedTuple):
    """Words in a row under one ``tag``; empty for none. ``colour``: the number of its colour."""

    text: str
    tag: str
    colour: int


def pieces(words: Sequence[str], tags: str, kinds: Sequence[str]) -> list[Piece]:
    """``words`` with their ``tags``, which stand in one text with a space between them.

    Tags that mark entities (``B-PER I-PER``, also as IOBES or BILOU) become one piece for each entity, under its kind;
    any other tag is a piece of its own for each word. ``kinds``: all kinds or tags, which decides the colours.
    """
    colours = {kind: number % COLOURS for number, kind in enumerate(kinds)}
    found: list[Piece] = []
    open_kind = ""
    for word, tag in zip_longest(words, tags.split(" ")[: len(words)], fillvalue=_OUTSIDE):
        mark, _, kind = tag.partition("-") if tag[1:2] == "-" else (tag, "", "")
        if tag == _OUTSIDE:
            open_kind = ""
            found.append(Piece(word, "", 0))
        elif kind and mark in _INSIDE and kind == open_kind:
            found[-1] = found[-1]._replace(text=f"{found[-1].text} {word}")
        else:
            open_kind = kind if kind and mark in _BEGIN + _INSIDE else ""
            name = kind or tag
            found.append(Piece(word, name, colours.get(name, 0)))
    return found
