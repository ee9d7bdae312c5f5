"""Alpaca's rows, ``{"instruction": ..., "input": ..., "output": ...}``, in Alpaca's own template.

``input`` may be missing or empty.
"""

from __future__ import annotations

from typing import Any

from trimtab.data.forms import _form
from trimtab.data.rows import Example, Row

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class Alpaca(_form.Form):
    """An instruction, perhaps with an input, and the output."""

    keys = ("instruction", "output")
    precedence = 3
    has_template = True

    def example(self, row: Row, tokenizer: Any) -> Example:
        instruction = self.text(row, "instruction")
        given = self.text(row, "input", optional=True)
        template = WITH_INPUT if given.strip() else WITHOUT_INPUT
        output = self.text(row, "output", filled=True)
        return _form.pair(row, template.format(instruction=instruction, input=given), output.strip())

    def prompt(self, text: str, tokenizer: Any) -> str:
        return WITHOUT_INPUT.format(instruction=text)
