"""Rows ``{"prompt": ..., "completion": ...}``. The model reads the prompt as it stands."""

from __future__ import annotations

from typing import Any

from trimtab.data.forms import _form
from trimtab.data.rows import Example, Row


class Completion(_form.Form):
    """A prompt and its completion."""

    keys = ("prompt", "completion")
    precedence = 2

    def example(self, row: Row, tokenizer: Any) -> Example:
        prompt, completion = self.keys
        return _form.pair(row, self.text(row, prompt), self.text(row, completion, filled=True))
