"""FinLoRA's rows: ``{"context": ..., "target": ...}``. The model reads the context as it stands."""

from __future__ import annotations

from typing import Any

from trimtab.data.forms import _form
from trimtab.data.rows import Example, Row


class FinLoRA(_form.Form):
    """A context, which is the prompt, and a target, which is the completion."""

    keys = ("context", "target")
    precedence = 1

    def example(self, row: Row, tokenizer: Any) -> Example:
        return _form.pair(row, self.text(row, "context"), self.text(row, "target", filled=True))
