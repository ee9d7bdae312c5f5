"""Rows ``{"source": ..., "target": ...}``: a text and what it becomes, such as its translation.

A model with an encoder reads the source as it stands; a causal language model reads it and a line break, and learns to
write the target after that.
"""

from __future__ import annotations

from trimtab.data.forms import _form
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Row


class SourceTarget(_form.PairForm):
    """A text and what it becomes."""

    keys = ("source", "target")
    precedence = 12
    has_template = True
    answer = "target"

    def question(self, row: Row, reading: Reading) -> str:
        return self.text(row, "source", reading)

    def put(self, question: str) -> str:
        return f"{question.rstrip()}\n"
