"""How a run measures its model while it is trained: on its test sets, and on the validation rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab import metrics
from trimtab.config.resolve import Job
from trimtab.data.rows import Example
from trimtab.evaluation.evaluate import Evaluation, checked, evaluate, token_loss
from trimtab.runs.events import Listener
from trimtab.surgery.serving import evaluating
from trimtab.tasks import Head, Inputs


class Measuring:
    """Measures the model of a run as its configuration says."""

    def __init__(self, job: Job, inputs: Inputs, head: Head, tokenizer: Any, listener: Listener) -> None:
        self._job = job
        self._inputs = inputs
        self._head = head
        self._tokenizer = tokenizer
        self._listener = listener

    def test_set(self, name: str) -> Evaluation:
        """Evaluate the test set of that name."""
        return self._evaluation(self._inputs.tests[name], name)

    def _evaluation(self, rows: list[Example], name: str) -> Evaluation:
        return evaluate(
            self._head,
            self._tokenizer,
            rows,
            name=name,
            choices=self._inputs.choices,
            batch_size=self._job.config.evaluation.batch_size,
            max_new_tokens=self._job.config.evaluation.max_new_tokens,
            max_length=self._job.reading_length,
            progress=lambda done, total: self._listener.evaluating(name, done, total),
        )

    def validation(self) -> Mapping[str, float]:
        """The metrics of the validation rows that can choose the best step: the loss, and where answers are scored,
        those of scored answers."""
        rows = self._inputs.validation
        if not self._inputs.scored:
            size, length = self._job.config.evaluation.batch_size, self._job.max_length
            with evaluating(self._head.model):
                loss, tokens = token_loss(self._head, self._tokenizer, rows, batch_size=size, max_length=length)
            outcomes = metrics.Outcomes(loss=checked(loss, tokens), tokens=tokens)
            return metrics.of_validation(metrics.measure("perplexity", outcomes))
        return metrics.of_validation(self._evaluation(rows, "validation").record.figures)
