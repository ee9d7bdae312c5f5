"""Rows ``{"question": ..., "answer": ...}``, perhaps with a ``context`` that the question is about.

The model reads the context, if there is one, then "Question: ..." and "Answer:", and learns to write the answer.
"""

from __future__ import annotations

from trimtab.data.forms import _form
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Row


class QuestionAnswer(_form.PairForm):
    """A question and its answer."""

    keys = ("question", "answer")
    optional = ("context", "system", "history")
    precedence = 9
    has_template = True
    answer = "answer"

    def question(self, row: Row, reading: Reading) -> str:
        return self._context(row, reading) + self.text(row, "question", reading)

    def put(self, question: str) -> str:
        return f"Question: {question}\nAnswer: "

    def asked(self, row: Row, reading: Reading) -> str:
        return self._context(row, reading) + self.put(self.text(row, "question", reading))

    def _context(self, row: Row, reading: Reading) -> str:
        context = self.text(row, "context", reading, optional=True)
        return f"{context}\n\n" if context.strip() else ""
