"""Dolly's rows, ``{"instruction": ..., "context": ..., "response": ...}``, in Alpaca's template.

``context`` may be missing or empty.
"""

from __future__ import annotations

from trimtab.data.forms import alpaca


class Dolly(alpaca.Alpaca):
    """An instruction, perhaps with a context, and the response."""

    keys = ("instruction", "response")
    optional = ("context", "system", "history")
    precedence = 8
    given, answer = "context", "response"
