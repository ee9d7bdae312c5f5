"""Regression: a text, or a pair of texts, has a number.

Rows are ``{"text": ..., "label": 3.7}``, with ``"text_pair"`` where two texts are compared. The head has one row, and
the loss is the squared error, as in transformers' own head for ``num_labels = 1``.

A new head begins around the mean of the training rows' numbers, and learns in steps of their standard deviation s
(`models/heads.py`); gradients are those of the squared error in units of s. So numbers in the thousands are learned as
fast as numbers around zero, while the model says the numbers themselves at every step, in every checkpoint. Where
nothing is said of the precision a run computes in float32: bfloat16 tells numbers near 1000 apart only by 4.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.config.resolve import Job
from trimtab.data.labelled import Labelled, is_broken, number_of, text_of
from trimtab.data.rows import Row
from trimtab.errors import ConfigError, DataError
from trimtab.evaluation.answers import Judged, prediction
from trimtab.metrics import Kind
from trimtab.models.causal_head import IGNORED
from trimtab.models.heads import Family, head_modules
from trimtab.models.load import empty_model
from trimtab.models.locate import ModelHead
from trimtab.outcomes import Outcomes
from trimtab.runs.events import Listener
from trimtab.tasks import _labelled, _read_text
from trimtab.tasks._encoded import Tensors
from trimtab.tasks._inputs import Inputs
from trimtab.tasks._sizes import Batch

_STEPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-23}
"""How far apart neighbouring numbers are, as a share of them."""

_COARSE = 0.02
"""A step between neighbouring numbers, in standard deviations, that is worth a word."""


class Regression(_labelled.LabelledTask):
    """A number of a text."""

    model_class = "AutoModelForSequenceClassification"
    metrics = ("loss", "rmse", "pearson", "spearman", "mean_absolute_error")
    keys = ("text", "text_pair", "label")
    loss_unit = "squared error"
    precedence = 30
    precision = "float32"
    weighs = False

    def suits(self, family: Family, classes: Sequence[str], row: Mapping[str, Any] | None) -> bool:
        classifies = family == "encoder" or any(name.endswith("ForSequenceClassification") for name in classes)
        return classifies and row is not None and is_broken(row.get("label"))

    def serves(self, head: ModelHead) -> bool:
        return super().serves(head) and head.problem == "regression"

    def example(self, row: Row) -> Labelled:
        pair = row.value.get("text_pair")
        return Labelled(
            row.source,
            row.number,
            number_of(row.value.get("label"), row.place),
            text=text_of(row),
            pair=text_of(row, "text_pair") if pair is not None else None,
            form="text and number",
        )

    def labels_of(self, training: Sequence[Labelled]) -> None:
        if len({row.label for row in training}) == 1:
            raise DataError(f"{training[0].source}: every row has the number {training[0].answer}: nothing to learn.")

    def problem(self, inputs: Inputs) -> str:
        return "regression"

    def read(self, job: Job, reader: Any, listener: Listener) -> Inputs:
        inputs = super().read(job, reader, listener)
        metric = job.config.train.metric
        if metric in ("pearson", "spearman") and len({row.label for row in inputs.validation}) == 1:
            raise ConfigError(
                f"train.metric: {metric} needs validation rows with different numbers, and these have one "
                f"({inputs.validation[0].answer}); give other rows, or choose loss"
            )
        centre, spread = _centre_and_spread(inputs)
        for row in inputs.rows:
            row["weight"] = 1 / spread**2
        listener.note(f"numbers around {centre:.4g}, with a standard deviation of {spread:.4g}")
        notes = []
        if (step := _STEPS[job.precision] * abs(centre)) > _COARSE * spread:
            cure = "leave train.precision out, or subtract" if job.precision != "float32" else "subtract"
            notes.append(
                f"numbers around {centre:.6g} are told apart only by {step:.2g} in {job.precision}, and these differ "
                f"by {spread:.2g}: {cure} {centre:.6g} from every label"
            )
        if abs(centre) > spread and not _has_bias(job.read_for(self.head_for(job, inputs))):
            notes.append(
                f"the head of this kind of model has no bias, so it has to learn that numbers lie around {centre:.4g}: "
                f"labels from which {centre:.4g} is subtracted are learned faster"
            )
        for note in notes:
            listener.remark(note)
        return replace(inputs, notes=(*inputs.notes, *notes))

    def head_for(self, job: Job, inputs: Inputs) -> ModelHead:
        centre, spread = _centre_and_spread(inputs)
        return replace(super().head_for(job, inputs), centre=centre, spread=spread)

    def kind(self, example: Labelled, labels: Sequence[str] | None) -> Kind:
        return "number"

    def encode(
        self, examples: Sequence[Labelled], reader: Any, labels: Sequence[str] | None, max_length: int | None
    ) -> list[Tensors]:
        rows = _read_text.tokenised(examples, reader, max_length)
        for row, example in zip(rows, examples, strict=True):
            assert isinstance(example.label, float), "rows of a regression have numbers"
            # The one number by which a batch says that a place has no label is not to be met by chance.
            row["labels"] = example.label if example.label != IGNORED else IGNORED * (1 + 2.0**-23)
        return rows

    def require_readable(self, config: Any, rows: Sequence[Tensors], places: Sequence[str]) -> None:
        _read_text.require_ends(config, rows, places)

    def pad(self, rows: Sequence[Tensors], reader: Any) -> dict[str, Tensor]:
        return _read_text.padded(rows, reader)

    def costs(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.squeeze(-1) - labels.to(logits.dtype)).square()

    def loss(
        self, head: Any, batch: Mapping[str, Tensor], *, count: int | Tensor | None = None, prompt_weight: float = 0.0
    ) -> Tensor:
        """The squared error, whose gradient is that of the error in units of the numbers' spread."""
        plain = {name: tensor for name, tensor in batch.items() if name != "weight"}
        value = super().loss(head, plain, count=count)
        if "weight" not in batch:
            return value
        share = value * batch["weight"][0].to(value.dtype)
        return value.detach() + (share - share.detach())  # what is taken away is 0, however small the value

    def nats(self, loss: float) -> float:
        """Those of a normal distribution as wide as the errors. In whatever unit the numbers are, it is the same."""
        return math.log(max(loss, sys.float_info.min)) / 2

    def judge(self, logits: Sequence[Tensor], examples: Sequence[Labelled], labels: Sequence[str] | None) -> Judged:
        given = [float(logit) for logit in logits]
        rows = [
            prediction(at, example, f"{number:.8g}", None)
            for at, (example, number) in enumerate(zip(examples, given, strict=True))
        ]
        truth = [float(example.label) for example in examples]  # type: ignore[arg-type]
        outcomes = Outcomes(true_numbers=truth, given_numbers=given)
        return Judged("number", outcomes, rows, {"spread": statistics.pstdev(truth)})

    def shown(self, row: Tensors, reader: Any, labels: Sequence[str] | None) -> tuple[tuple[str, bool], ...]:
        return (_read_text.decoded(row, reader), False), (f" {row['labels']:.9g}", True)

    def sample(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        return {**_read_text.sample(batch.rows, batch.length), "labels": torch.zeros(batch.rows)}


def _centre_and_spread(inputs: Inputs) -> tuple[float, float]:
    """Mean and standard deviation of the numbers of the training rows, each as often as it comes in an epoch."""
    numbers = [row["labels"] for row in inputs.rows]
    # Rows that are drawn may all have one number although others differ; any step will do then.
    return statistics.fmean(numbers), statistics.pstdev(numbers) or max(abs(numbers[0]), 1.0)


def _has_bias(job: Job) -> bool:
    """Whether the last layer of the head of a job's model has a bias."""
    model = empty_model(job.files)
    last = [layer for layer in map(model.get_submodule, head_modules(model)) if getattr(layer, "out_features", 0) == 1]
    return any(layer.bias is not None for layer in last)
