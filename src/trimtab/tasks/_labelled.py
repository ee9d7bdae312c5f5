"""What the tasks have in common whose answer is a head's: rows with labels, batches, the loss, and measuring.

Such a task says which keys its rows have (`example`), how a row becomes tensors (`encode`), what a wrong answer costs
(`costs`), and how the head's logits are judged (`judge`).
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.config.resolve import Job
from trimtab.config.run import EvaluationConfig
from trimtab.data.batches import by_length
from trimtab.data.labelled import Labelled, is_whole, labelled_as, read_labelled
from trimtab.data.preview import Preview
from trimtab.data.rows import Row, Source
from trimtab.errors import ConfigError, DataError
from trimtab.evaluation.answers import Judged
from trimtab.evaluation.evaluate import Evaluation, Progress, checked
from trimtab.metrics import Kind, measure
from trimtab.models.causal_head import IGNORED
from trimtab.models.head_loss import wide
from trimtab.models.locate import ModelHead
from trimtab.models.model_files import require_rows
from trimtab.notes import Notes, rows as counted
from trimtab.processes import divided
from trimtab.runs.events import Listener
from trimtab.runs.results import RESULTS
from trimtab.surgery.contexts import evaluating
from trimtab.tasks._answer import Answer, of_logits
from trimtab.tasks._encoded import Tensors, token_ids
from trimtab.tasks._inputs import Inputs, gather
from trimtab.tasks._labelled_rows import LabelledRows
from trimtab.tasks._sizes import RowSizes, with_most_characters
from trimtab.tasks._task import Measurement, Task


class LabelledTask(Task):
    """A task whose rows have labels, and whose model has a head of its own for them."""

    keys: ClassVar[tuple[str, ...]]
    """What the rows of the task may hold; another column is mapped to one of these by ``data.columns``."""
    loss_unit = "nats per label"
    weighs: ClassVar[bool] = True
    """Whether ``train.class_weights`` has a meaning."""

    @abstractmethod
    def example(self, row: Row) -> Labelled:
        """The row of the task that was read. Raises DataError, which names the row and what it lacks."""

    @abstractmethod
    def problem(self, inputs: Inputs) -> str:
        """The kind of problem, as transformers names it (`ModelHead`)."""

    @abstractmethod
    def encode(
        self, examples: Sequence[Labelled], reader: Any, labels: Sequence[str] | None, max_length: int | None
    ) -> list[Tensors]:
        """The tensors of each row, with its ``labels``, and ``cut``: whether it was shortened."""

    def kind(self, example: Labelled, labels: Sequence[str] | None) -> Kind:
        """What results of rows such as ``example`` are called."""
        return "choice"

    def weigh(self, row: Tensors, example: Labelled, weights: Mapping[str, float]) -> None:
        """Say what ``row`` counts, by the ``weights`` of labels: the mean of its own; a row without any counts 1."""
        mine = [weights[label] for label in example.labels]
        row["weight"] = sum(mine) / len(mine) if mine else 1.0

    def stacked_weights(self, rows: Sequence[Tensors], width: int) -> Tensor:
        """The weights of a batch; see ``stacked_labels``."""
        return torch.tensor([row["weight"] for row in rows])

    def picked(self, row: Tensors, logits: Tensor) -> Tensor:
        """What of the ``logits`` of a row in its batch answers it."""
        return logits

    @abstractmethod
    def costs(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What each of ``labels`` costs, in nats or squared; of the labels' shape. ``logits`` are in float32."""

    @abstractmethod
    def judge(self, logits: Sequence[Tensor], examples: Sequence[Labelled], labels: Sequence[str] | None) -> Judged:
        """The head's answers, judged: ``logits`` of each row, in float32 on the processor."""

    @abstractmethod
    def pad(self, rows: Sequence[Tensors], reader: Any) -> dict[str, Tensor]:
        """A batch of rows, without labels and weights."""

    def stacked_labels(self, rows: Sequence[Tensors], width: int) -> Tensor:
        """The labels of a batch, whose texts are ``width`` tokens wide."""
        return torch.stack([torch.as_tensor(row["labels"]) for row in rows])

    def labels_of(self, training: Sequence[Labelled]) -> list[str] | None:
        """The labels of the training rows, sorted; None where they are numbers."""
        found = {label for row in training for label in row.labels}
        if len(found) > max(20, len(training) / 2):
            raise DataError(
                f"{training[0].source}: {len(found):,} different labels on {len(training):,} rows are no classes; for "
                "numbers say task: regression, for texts to be written task: causal_lm, or name the right column in "
                "data.columns."
            )
        return sorted(found, key=lambda label: (int(label), "") if is_whole(label) else (math.inf, label))

    def rows(self, sources: Sequence[Source], reader: Any, notes: Notes) -> list[Labelled]:
        return read_labelled(sources, self.example, keys=self.keys, root=Path.cwd(), notes=notes)

    def known(self, head: ModelHead, rows: list[Labelled], *, numbered: bool) -> list[Labelled]:
        return labelled_as(head, rows, numbered=numbered)

    def asked(self, row: Row, head: ModelHead) -> Labelled:
        said = {key: value for key, value in row.value.items() if key not in ("label", "labels")}
        return self.example(replace(row, value={**said, "label": head.labels[0] if head.labels else 0.0}))

    def answers(
        self,
        model: Any,
        reader: Any,
        asked: Sequence[Labelled],
        *,
        head: ModelHead,
        evaluation: EvaluationConfig,
        max_length: int | None,
    ) -> list[Answer]:
        found, cut = self._logits_of(
            model, reader, asked, head, batch_size=evaluation.batch_size, max_length=max_length
        )
        answers = [self.answer(row, logits, head) for row, logits in zip(asked, found, strict=True)]
        return [replace(answer, cut=at in cut) for at, answer in enumerate(answers)]

    def answer(self, row: Labelled, logits: Tensor, head: ModelHead) -> Answer:
        """What ``logits`` answer for ``row``."""
        return of_logits(logits, head)

    def compared(
        self, model: Any, reader: Any, rows: Sequence[Labelled], *, head: ModelHead, length: int | None
    ) -> Tensor:
        found, _ = self._logits_of(model, reader, rows, head, batch_size=32, max_length=length)
        return torch.cat([one.reshape(-1, one.shape[-1]) for one in found])

    def _logits_of(
        self,
        model: Any,
        reader: Any,
        rows: Sequence[Labelled],
        head: ModelHead,
        *,
        batch_size: int,
        max_length: int | None,
    ) -> tuple[list[Tensor], set[int]]:
        """The logits of each row, and which rows were cut."""
        encoded = self.encode(rows, reader, head.labels or None, max_length)
        self.require_readable(model.config, encoded, [row.place for row in rows])
        cut = {at for at, row in enumerate(encoded) if row.pop("cut", False)}
        return self._logits_of_all(self.head(model), reader, encoded, batch_size, None)[0], cut

    def read(self, job: Job, reader: Any, listener: Listener) -> Inputs:
        if job.config.train.prompt_loss_weight:
            raise ConfigError(f"train.prompt_loss_weight: the rows of {self.name} have no prompts; leave it at 0")
        if job.config.task == "auto":
            listener.note(f"task: {self.name}, by the kind of model and the keys of the rows")
        return gather(LabelledRows(self, job, reader, listener))

    def head_for(self, job: Job, inputs: Inputs) -> ModelHead:
        return ModelHead(
            self.model_class, self.problem(inputs), tuple(inputs.choices or ()), seed=job.config.train.seed
        )

    def collator(self, reader: Any, *, prompts: bool = False) -> Callable[[Sequence[Tensors]], dict[str, Tensor]]:
        return partial(self._collate, reader=reader)

    def _collate(self, rows: Sequence[Tensors], reader: Any) -> dict[str, Tensor]:
        batch = self.pad(rows, reader)
        width = batch["input_ids"].shape[1] if "input_ids" in batch else 0
        batch["labels"] = self.stacked_labels(rows, width)
        if "weight" in rows[0]:
            batch["weight"] = self.stacked_weights(rows, width)
        return batch

    def logits(self, head: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The head's logits for ``batch``, in float32 (or float64)."""
        return wide(head(**{name: one for name, one in batch.items() if name not in ("labels", "weight")}).logits)

    def loss(
        self, head: Any, batch: Mapping[str, Tensor], *, count: int | Tensor | None = None, prompt_weight: float = 0.0
    ) -> Tensor:
        labels = batch["labels"]
        costs = self.costs(self.logits(head, batch), labels)
        if (weight := batch.get("weight")) is not None:
            costs = costs * weight.reshape(*weight.shape, *[1] * (costs.dim() - weight.dim())).to(costs.dtype)
        return costs.sum() / ((labels != IGNORED).sum() if count is None else count)

    def evaluate(self, head: Any, reader: Any, examples: Sequence[Labelled], how: Measurement) -> Evaluation:
        if not examples:
            raise DataError(f"{how.name}: there are no rows to evaluate.")
        started = time.perf_counter()
        rows = self.encode(examples, reader, how.choices, how.max_length)
        self.require_readable(head.config, rows, [example.place for example in examples])
        cut = sum(row.pop("cut", False) for row in rows)
        logits, total, count = self._logits_of_all(head, reader, rows, how.evaluation.batch_size, how.progress)
        loss = checked(total, count)  # before the logits are judged: they would be no numbers either
        judged = self.judge(logits, examples, how.choices)
        figures = measure(judged.kind, judged.with_loss(loss, count))
        record = RESULTS[judged.kind](
            kind=judged.kind,
            dataset=how.name,
            rows=len(examples),
            figures=figures,
            seconds=round(time.perf_counter() - started, 3),
            **judged.details,
            **({"cut": cut} if cut else {}),
        )
        return Evaluation(how.name, record, judged.rows)

    def _logits_of_all(
        self, head: Any, reader: Any, rows: Sequence[Tensors], batch_size: int, progress: Progress | None
    ) -> tuple[list[Tensor], float, int]:
        """The logits of each row, the summed cost of all labels, and how many labels these are."""
        collate, device = self.collator(reader), head.device
        found: dict[int, Tensor] = {}
        total, count = 0.0, 0

        def run(indices: list[int]) -> tuple[Tensor, float, int]:
            batch = {key: value.to(device) for key, value in collate([rows[at] for at in indices]).items()}
            logits, labels = self.logits(head, batch), batch["labels"]
            return logits.cpu(), float(self.costs(logits, labels).sum()), int((labels != IGNORED).sum())

        with evaluating(head):
            batches = by_length([self.tokens(row) for row in rows], batch_size)
            for indices, (logits, cost, labels) in divided(batches, run, one_pass=True):
                total, count = total + cost, count + labels
                found.update((at, self.picked(rows[at], one)) for at, one in zip(indices, logits, strict=True))
                if progress is not None:
                    progress(len(found), len(rows))
        return [found[at] for at in range(len(rows))], total, count

    def held(self, job: Job, inputs: Inputs, reader: Any) -> list[str]:
        found, used = [], token_ids(inputs.rows)
        places = [f"{source}, row {number}" for source, number in inputs.rows.origins]
        self.require_readable(job.files.config, list(inputs.rows), places)
        for name, rows in (("", inputs.validation), *inputs.tests.items()):
            encoded = self.encode(rows, reader, inputs.choices, job.reading_length)
            self.require_readable(job.files.config, encoded, [row.place for row in rows])
            used |= token_ids(encoded)
            if name and (cut := sum(row.get("cut", False) for row in encoded)):
                found.append(f"{counted(cut)} of the test set {name} cut to {job.reading_length} tokens")
        if used:
            require_rows(job.config.model.name, reader, (), job.embedding_rows, used)
        return found

    def preview(self, inputs: Inputs, reader: Any) -> Preview:
        shown = []
        for at in range(min(2, len(inputs.rows))):
            (source, number), row = inputs.rows.origins[at], inputs.rows[at]
            shown.append((f"{source}, row {number}: {self.described(row)}", self.shown(row, reader, inputs.choices)))
        return Preview(tuple(shown))

    def require_readable(self, config: Any, rows: Sequence[Tensors], places: Sequence[str]) -> None:
        """Raise DataError, which names the row, for ``rows`` at ``places`` that a model of ``config`` does not read."""

    def described(self, row: Tensors) -> str:
        """The size of a row, in words."""
        return f"{self.tokens(row)} tokens"

    @abstractmethod
    def shown(self, row: Tensors, reader: Any, labels: Sequence[str] | None) -> tuple[tuple[str, bool], ...]:
        """Pieces of a row as the model sees it, each with whether it is what is learnt."""

    def sizes(self, job: Job, inputs: Inputs) -> RowSizes:
        measured = [row for rows in (inputs.validation, *inputs.tests.values()) for row in rows]
        few = with_most_characters(measured, lambda row: len(row.text) + len(row.pair or "") + len(" ".join(row.words)))
        encoded = self.encode(few, job.reader, inputs.choices, job.reading_length) if few else []
        tested = max(map(self.tokens, encoded), default=0)
        return RowSizes(max(inputs.rows.lengths), 1, bool(measured), tested=tested)

    def largest(self, job: Job) -> RowSizes:
        data = job.config.data
        return RowSizes(job.max_length, 1, bool(data.test or data.validation))
