"""What the tasks have in common whose answer is a head's: rows with labels, batches, the loss, and measuring.

Such a task says which keys its rows have (`example`), how a row becomes tensors (`encode`), what a wrong answer costs
(`costs`), and how the head's logits are judged (`judge`).
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.config.resolve import Job
from trimtab.config.run import EvaluationConfig
from trimtab.config.start_from import labels_of_head
from trimtab.data.batches import by_length
from trimtab.data.choices import check_choices
from trimtab.data.labelled import Labelled, labelled_as, read_labelled
from trimtab.data.preview import Preview
from trimtab.data.rows import Row, Source
from trimtab.errors import ConfigError, DataError
from trimtab.evaluation.answers import Judged
from trimtab.evaluation.evaluate import Evaluation, Progress, checked
from trimtab.metrics import Kind, choosing, measure
from trimtab.models.causal_head import IGNORED
from trimtab.models.head_loss import wide
from trimtab.models.heads import in_the_order_of
from trimtab.models.load import load_config_only
from trimtab.models.locate import ModelHead
from trimtab.notes import Notes
from trimtab.notes import rows as counted
from trimtab.processes import divided
from trimtab.runs.events import Listener
from trimtab.runs.results import RESULTS
from trimtab.surgery.contexts import evaluating
from trimtab.tasks._answer import Answer, of_logits
from trimtab.tasks._encoded import EncodedTensors, Tensors
from trimtab.tasks._inputs import Answers, Inputs, Rows, gather
from trimtab.tasks._sizes import RowSizes
from trimtab.tasks._task import Task

COUNTED = 5
"""More labels than these that are all whole numbers may be amounts, and no names."""


def is_whole(label: str) -> bool:
    """Whether the name of a label is a whole number."""
    return label.removeprefix("-").isdecimal()


class LabelledRows(Rows[Labelled]):
    """Rows with labels."""

    def __init__(self, task: LabelledTask, job: Job, reader: Any, listener: Listener) -> None:
        super().__init__(job.config, listener)
        self.task, self.job, self.reader = task, job, reader
        self.kind: Kind = "number"

    def read(self, sources: Sequence[Source], notes: Notes) -> list[Labelled]:
        if named := next((one.form for one in sources if one.form not in (None, "auto")), None):
            raise ConfigError(
                f"data.form: {named} is a form for causal_lm; the rows of {self.task.name} are read by their keys "
                f"({', '.join(self.task.keys)})"
            )
        return self.task.rows(sources, self.reader, notes)

    def answers(self, training: list[Labelled], notes: Notes) -> Answers:
        found = self.task.labels_of(training)
        said = self.config.data.choices
        if said not in (None, "auto") and found is None:
            raise ConfigError(f"data.choices: the rows of {self.task.name} are labelled with numbers; leave it at auto")
        if found is None:
            return Answers(None, scored=False)
        if isinstance(said, tuple):
            check_choices(said, [])
            labels = [label.strip() for label in said]
        else:
            labels = in_the_order_of(load_config_only(self.job.source), found)
        labels = self._as_begun(labels, found, said)
        if len(labels) < (1 if isinstance(training[0].label, tuple) else 2):
            only = f"'{labels[0]}' is the only label" if labels else "no row has a label"
            raise DataError(f"{training[0].source}: {only}, so there is nothing to tell apart.")
        answers = Answers(labels, scored=True)
        self.check(answers, training)
        self.kind = self.task.kind(training[0], labels)
        self.listener.note(f"{len(labels)} labels: {', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}")
        if said == "auto" and len(labels) > COUNTED and all(map(is_whole, labels)):
            notes.add(
                f"the labels are {len(labels)} whole numbers, and each is taken for a class of its own; if a near "
                "label is better than one that is far, say task: regression"
            )
        if unseen := [label for label in labels if label not in found]:
            notes.add(f"no training row has the label {', '.join(unseen)}, which cannot be learned then")
        return answers

    def _as_begun(self, labels: list[str], found: list[str], said: object) -> list[str]:
        """``labels`` in the order of the head that the run begins from: a head whose labels are others, or stand in
        another order, has learnt something else."""
        adapter = self.config.adapter
        known = labels_of_head(adapter) if adapter is not None else ()
        if not known or (set(found) <= set(known) and not isinstance(said, tuple)):
            return list(known) or labels
        if list(known) != labels:
            raise ConfigError(
                f"adapter: {adapter}: its head has the labels {', '.join(known[:20])}, and this run needs "
                f"{', '.join(labels[:20])}; give rows of its labels and no data.choices, or begin without adapter"
            )
        return labels

    def check(self, answers: Answers, rows: list[Labelled]) -> None:
        known = set(answers.choices or ())
        for row in rows:
            if (strange := [label for label in row.labels if label not in known]) and answers.choices is not None:
                raise DataError(
                    f"{row.place}: the label '{strange[0]}' is not among those of the training rows "
                    f"({', '.join(answers.choices[:20])}), so it cannot be learned; name all labels in data.choices, "
                    "or repair the row (upper and lower case differ)."
                )

    def check_metric(self, answers: Answers) -> None:
        metric, known = self.config.train.metric, choosing(self.kind)
        if metric not in ("auto", *known):
            raise ConfigError(
                f"train.metric: {metric} is not measured for these rows of {self.task.name}; choose one of "
                f"{', '.join(known)}"
            )

    def encode(self, training: list[Labelled], answers: Answers, notes: Notes) -> EncodedTensors:
        weights = self._weights(training, answers)
        rows = self.task.encode(training, self.reader, answers.choices, self.job.max_length)
        for example, row in zip(training, rows, strict=True):
            if weights:
                self.task.weigh(row, example, weights)
        cut = sum(row.pop("cut", False) for row in rows)
        if cut:
            notes.add(f"{counted(cut)} cut to data.max_length = {self.job.max_length} tokens")
        if dropped := [
            (example, count) for example, row in zip(training, rows, strict=True) if (count := row.pop("dropped", 0))
        ]:
            words = sum(count for _, count in dropped)
            first = dropped[0][0].place
            notes.add(f"{words:,} word{'s' * (words != 1)} of which the tokenizer leaves nothing, the first in {first}")
        if empty := [example for example in training if not example.prompt.strip()]:
            notes.add(f"{counted(len(empty))} to train on without any text, the first in {empty[0].place}")
        return EncodedTensors(rows, training, cut, self.task.tokens)

    def _weights(self, training: list[Labelled], answers: Answers) -> dict[str, float]:
        """What a row of each label counts, 1 on average over the rows; empty where all count alike."""
        said = self.config.train.class_weights
        if said is None:
            return {}
        if answers.choices is None or not self.task.weighs:
            raise ConfigError(f"train.class_weights: the rows of {self.task.name} have no classes to weigh")
        counts = Counter(label for row in training for label in row.labels)
        if said == "balanced":
            weights = {label: 1 / counts[label] if counts[label] else 0.0 for label in answers.choices}
        else:
            if strange := [label for label in said if label not in answers.choices]:
                raise ConfigError(
                    f"train.class_weights: '{strange[0]}' is not a label; expected some of {', '.join(answers.choices)}"
                )
            weights = {label: said.get(label, 1.0) for label in answers.choices}
        mean = sum(weights[label] * count for label, count in counts.items()) / counts.total()
        return {label: weight / mean for label, weight in weights.items()}


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
        found = self._logits_of(model, reader, asked, head, batch_size=evaluation.batch_size, max_length=max_length)
        return [self.answer(row, logits, head) for row, logits in zip(asked, found, strict=True)]

    def answer(self, row: Labelled, logits: Tensor, head: ModelHead) -> Answer:
        """What ``logits`` answer for ``row``."""
        return of_logits(logits, head)

    def compared(
        self, model: Any, reader: Any, rows: Sequence[Labelled], *, head: ModelHead, length: int | None
    ) -> Tensor:
        found = self._logits_of(model, reader, rows, head, batch_size=32, max_length=length)
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
    ) -> list[Tensor]:
        encoded = self.encode(rows, reader, head.labels or None, max_length)
        for row in encoded:
            row.pop("cut", None)
        return self._logits_of_all(self.head(model), reader, encoded, batch_size, None)[0]

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

    def evaluate(
        self,
        head: Any,
        reader: Any,
        examples: Sequence[Labelled],
        *,
        name: str,
        choices: Sequence[str] | None,
        evaluation: EvaluationConfig,
        max_length: int | None,
        progress: Progress | None = None,
    ) -> Evaluation:
        if not examples:
            raise DataError(f"{name}: there are no rows to evaluate.")
        started = time.perf_counter()
        rows = self.encode(examples, reader, choices, max_length)
        cut = sum(row.pop("cut", False) for row in rows)
        logits, total, count = self._logits_of_all(head, reader, rows, evaluation.batch_size, progress)
        judged = self.judge(logits, examples, choices)
        figures = measure(judged.kind, judged.with_loss(checked(total, count), count))
        record = RESULTS[judged.kind](
            kind=judged.kind,
            dataset=name,
            rows=len(examples),
            figures=figures,
            seconds=round(time.perf_counter() - started, 3),
            **judged.details,
            **({"cut": cut} if cut else {}),
        )
        return Evaluation(name, record, judged.rows)

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

    def preview(self, inputs: Inputs, reader: Any) -> Preview:
        shown = []
        for at in range(min(2, len(inputs.rows))):
            (source, number), row = inputs.rows.origins[at], inputs.rows[at]
            shown.append((f"{source}, row {number}: {self.described(row)}", self.shown(row, reader, inputs.choices)))
        return Preview(tuple(shown))

    def described(self, row: Tensors) -> str:
        """The size of a row, in words."""
        return f"{self.tokens(row)} tokens"

    @abstractmethod
    def shown(self, row: Tensors, reader: Any, labels: Sequence[str] | None) -> tuple[tuple[str, bool], ...]:
        """Pieces of a row as the model sees it, each with whether it is what is learnt."""

    def sizes(self, job: Job, inputs: Inputs) -> RowSizes:
        return RowSizes(max(inputs.rows.lengths), 1, bool(inputs.validation or inputs.tests))

    def largest(self, job: Job) -> RowSizes:
        data = job.config.data
        return RowSizes(job.max_length, 1, bool(data.test or data.validation))
