"""Rows ``{"prompt": ..., "completion": ...}``. The model reads the prompt as it stands."""

from __future__ import annotations

from trimtab.data.forms import _form
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Row


class Completion(_form.PairForm):
    """A prompt and its completion."""

    keys = ("prompt", "completion")
    precedence = 3
    answer = "completion"

    def question(self, row: Row, reading: Reading) -> str:
        return self.text(row, self.keys[0], reading)
