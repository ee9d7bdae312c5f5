"""Alpaca's rows, ``{"instruction": ..., "input": ..., "output": ...}``, in Alpaca's own template.

``input`` may be missing or empty. ``system`` takes the place of the template's first sentences, as in axolotl.
"""

from __future__ import annotations

from trimtab.data.forms import _form
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Row

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


class Alpaca(_form.PairForm):
    """An instruction, perhaps with an input, and the output."""

    keys = ("instruction", "output")
    optional = ("input", "system", "history")
    precedence = 4
    has_template = True
    given, answer = "input", "output"

    def opening(self, row: Row, reading: Reading) -> str:
        return WITH_INPUT if self._given(row, reading) else WITHOUT_INPUT

    def question(self, row: Row, reading: Reading) -> str:
        return "\n".join(filter(None, (self.text(row, "instruction", reading), self._given(row, reading))))

    def put(self, question: str) -> str:
        return f"### Instruction:\n{question}\n\n### Response:\n"

    def asked(self, row: Row, reading: Reading) -> str:
        if not (given := self._given(row, reading)):
            return self.put(self.text(row, "instruction", reading))
        return f"### Instruction:\n{self.text(row, 'instruction', reading)}\n\n### Input:\n{given}\n\n### Response:\n"

    def completion(self, row: Row, reading: Reading) -> str:
        return super().completion(row, reading).strip()

    def _given(self, row: Row, reading: Reading) -> str:
        given = self.text(row, self.given, reading, optional=True)
        return given if given.strip() else ""
