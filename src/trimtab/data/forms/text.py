"""Rows ``{"text": ...}``: plain text, all of which carries loss."""

from __future__ import annotations

from typing import Any

from trimtab.data.forms import _form
from trimtab.data.rows import Example, Row


class Text(_form.Form):
    """A text without prompt and answer."""

    keys = ("text",)
    precedence = 6

    def example(self, row: Row, tokenizer: Any) -> Example:
        text = self.text(row, "text")
        return Example(
            source=row.source,
            number=row.number,
            text=text,
            trained=((0, len(text)),),
            prompt="",
            answer=None,
            ends=True,
        )
