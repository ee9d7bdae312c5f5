"""Rows ``{"text": ...}``: plain text, all of which carries loss."""

from __future__ import annotations

from trimtab.data.forms import _form
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Example, Row


class Text(_form.Form):
    """A text without prompt and answer."""

    keys = ("text",)
    precedence = 11

    def example(self, row: Row, reading: Reading) -> Example | None:
        text = self.text(row, "text", reading)
        _, end = reading.split_end(text, row.place)
        text = text.rstrip() if end else text
        return Example(
            source=row.source,
            number=row.number,
            text=text,
            trained=((0, len(text)),),
            prompt="",
            answer=None,
            ends=not end,
        )
