"""Rows ``{"text": ..., "label": ...}``: the text is the prompt, and the label is learnt as its answer.

The model reads the text and, in a line of its own, "Label:", and learns to write the label as it stands in the row; so
a class is learnt better by its name than by its number. ``data.form: text`` learns the texts alone.
"""

from __future__ import annotations

from trimtab.data.forms import _form
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Example, Row


class LabelledText(_form.PairForm):
    """A text and its label."""

    keys = ("text", "label")
    precedence = 10
    has_template = True
    answer = "label"

    def question(self, row: Row, reading: Reading) -> str:
        return self.text(row, "text", reading).rstrip()

    def put(self, question: str) -> str:
        return f"{question}\nLabel: "

    def example(self, row: Row, reading: Reading) -> Example | None:
        reading.tell(row.place, "'label' is learnt as the answer to 'text'", "data.form: text learns the texts alone")
        return super().example(row, reading)
