"""What a model is asked for: how its rows are read and batched, and what its loss is."""

from __future__ import annotations

from trimtab.tasks._head import Head
from trimtab.tasks._inputs import Inputs, read_inputs

__all__ = ["Head", "Inputs", "read_inputs"]
