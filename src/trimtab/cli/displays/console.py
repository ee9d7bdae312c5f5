"""The way out to the terminal: nothing that a file says can drive it, and no figure is cut.

Verbs and displays draw on this console alone, and print plain lines with ``trimtab.cli.exits.say``: control characters
from names, rows, templates and models are shown as escapes, and square brackets in them stay brackets. A table that a
narrow terminal has no room for is told line by line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from trimtab.errors import printable

_WHOLE = 32
"""A figure or a word of at most so many letters is never broken in a table."""


class Terminal(Console):
    """A console whose texts are never markup and never act: the escape sequences in its output are rich's own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)  # before it is measured, so that a cell has room for it

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Table):
            renderable = self._fitted(renderable, options or self.options)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def _fitted(self, table: Table, options: ConsoleOptions) -> RenderableType:
        """``table`` with its figures whole, its texts wrapped between words; where there is no room for that, the rows
        one below the other. A column whose ``overflow`` is crop may be cut."""
        if len(table.columns) <= 2 or not table.show_header:  # a name and a value; a bar
            return table
        wide = options.update(width=1000)
        least, words, most = [], [], []
        for column in table.columns:
            known = [Measurement.get(self, wide, cell) for cell in (*column.cells, column.footer)]
            whole = column.no_wrap or column.justify == "right"
            heading = Measurement.get(self, wide, column.header)
            widths = [heading[column.no_wrap], *(one[whole] for one in known)]
            if column.overflow == "crop":
                widths = [heading.minimum]
            column.width, column.min_width = None, max(min(_WHOLE, max(widths)), column.min_width or 0)
            column.min_width = min(column.min_width, column.max_width or column.min_width)
            least.append(column.min_width)
            word = max(column.min_width, heading.minimum, *(one.minimum for one in known))
            words.append(min(word, column.max_width or word))
            most.append(max(column.min_width, *(one.maximum for one in known)))
        natural = table.__rich_measure__(self, wide)
        if natural.maximum <= options.max_width:
            return table
        spare = options.max_width - sum(least) - (natural.minimum - sum(words))  # of what stands between columns, too
        if spare >= 0:
            if not table.expand:
                for column, width in zip(table.columns, _shared(spare, least, most), strict=True):
                    column.width = width
            return table
        rows = list(zip(*(column.cells for column in table.columns), strict=True))
        if table.show_footer:
            rows.append(tuple(column.footer for column in table.columns))
        blocks = [Text("\n").join(self._told(table.columns, row)) for row in rows]
        title = [self._text(table.title)] if table.title else []
        return Group(*title, Text("\n\n").join(block for block in blocks if block), "")

    def _told(self, columns: Iterable[Column], row: Iterable[RenderableType]) -> Iterator[Text]:
        """The cells of a row of a table, each behind the heading of its column."""
        for column, cell in zip(columns, row, strict=True):
            if isinstance(cell, str | Text) and str(cell):
                heading = " ".join(str(column.header).split())
                yield Text.assemble((f"{heading}: " if heading else "", "dim"), self._text(cell))

    def _text(self, cell: RenderableType) -> Text:
        return cell if isinstance(cell, Text) else self.render_str(str(cell))


def _shared(spare: int, least: list[int], most: list[int]) -> list[int]:
    """The widths of columns: the least of each, and as much of ``spare`` as it has a use for, in equal shares."""
    widths = list(least)
    order = sorted(range(len(least)), key=lambda place: most[place] - least[place])
    for rank, place in enumerate(order):
        given = min(most[place] - least[place], spare // (len(order) - rank))
        widths[place] += given
        spare -= given
    return widths
