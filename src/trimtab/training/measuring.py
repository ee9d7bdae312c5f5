"""How a run measures its model while it is trained: on its test sets, and on the validation rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.config.resolve import Job
from trimtab.evaluation.evaluate import Evaluation
from trimtab.runs.events import Listener
from trimtab.tasks import Inputs, Task


@dataclass(frozen=True)
class Measuring:
    """Measures the model of a run as its configuration says; ``head`` and ``reader`` are what ``task`` made."""

    job: Job
    task: Task
    inputs: Inputs
    head: Any
    reader: Any
    listener: Listener

    def test_set(self, name: str) -> Evaluation:
        """Evaluate the test set of that name."""
        return self.task.evaluate(
            self.head,
            self.reader,
            self.inputs.tests[name],
            name=name,
            choices=self.inputs.choices,
            evaluation=self.job.config.evaluation,
            max_length=self.job.reading_length,
            progress=lambda done, total: self.listener.evaluating(name, done, total),
        )

    def validation(self) -> Mapping[str, float]:
        """The metrics of the validation rows that can choose the best step: the loss, and where answers are scored,
        those of scored answers."""
        return self.task.validation(
            self.head,
            self.reader,
            self.inputs.validation,
            inputs=self.inputs,
            job=self.job,
            progress=lambda done, total: self.listener.evaluating("validation", done, total),
        )
