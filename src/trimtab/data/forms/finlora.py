"""FinLoRA's rows: ``{"context": ..., "target": ...}``. The model reads the context as it stands."""

from __future__ import annotations

from trimtab.data.forms.completion import Completion


class FinLoRA(Completion):
    """A context, which is the prompt, and a target, which is the completion."""

    keys = ("context", "target")
    precedence = 1
    answer = "target"
