"""The way out to the terminal: nothing that a file says can drive it.

Verbs and displays draw on this console alone, and print plain lines with ``trimtab.cli.exits.say``: control characters
from names, rows, templates and models are shown as escapes, and square brackets in them stay brackets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from trimtab.errors import printable


class Terminal(Console):
    """A console whose texts are never markup and never act: the escape sequences in its output are rich's own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)  # before it is measured, so that a cell has room for it

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
