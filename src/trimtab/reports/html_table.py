"""The one table of the pages: words to the left, numbers to the right, and a box of its own to scroll in."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence


def html_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: Collection[int] = (0,),
    tall: bool = False,
    marked: Collection[int] = (),
) -> str:
    """A table as HTML.

    Args:
        heads: the columns' titles, plain text.
        rows: as many cells each, plain text; the first one names the row.
        words: numbers of the columns that hold words; the others hold numbers.
        tall: give it a height of its own, for many rows.
        marked: numbers of the rows that stand out.
    """

    def cell(tag: str, column: int, text: str) -> str:
        kind = "" if column in words else " class=n"
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", column, text) for column, text in enumerate(heads))
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(cell("td" if column else "th", column, text) for column, text in enumerate(row))
        body += f"<tr{' class=best' if number in marked else ''}>{cells}</tr>"
    box = '<div class="scroll tall" tabindex="0">' if tall else '<div class="scroll">'
    return f'{box}<table class="wide"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
