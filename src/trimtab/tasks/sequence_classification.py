"""Classification of texts, or of pairs of texts: each has one label, or several.

Rows are ``{"text": ..., "label": ...}``, with ``"text_pair"`` where two texts are compared, and with ``"labels"``, a
list that may be empty, or one of flags (0 or 1 for each label), where a text may have several. The head has a row of
logits for each label. The loss is the cross-entropy of the label; of several labels, the binary cross-entropy of each.
A label is given where its probability is at least one half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data.labelled import Labelled, name_of_label, text_of
from trimtab.data.rows import Row, Source
from trimtab.errors import DataError
from trimtab.evaluation.answers import Judged
from trimtab.metrics import METRICS, Kind, Metric
from trimtab.models.heads import Family
from trimtab.models.locate import ModelHead
from trimtab.notes import Notes
from trimtab.tasks import _labelled, _read_text
from trimtab.tasks._encoded import Tensors
from trimtab.tasks._inputs import Inputs
from trimtab.tasks._judged import judged_classes, judged_labels
from trimtab.tasks._sizes import Batch


class SequenceClassification(_labelled.LabelledTask):
    """One label of a text, or several."""

    model_class = "AutoModelForSequenceClassification"
    metrics = ("loss", "accuracy", "macro_f1", "micro_f1")
    keys = ("text", "text_pair", "label", "labels")
    precedence = 40

    def suits(self, family: Family, classes: Sequence[str], row: Mapping[str, Any] | None) -> bool:
        return family == "encoder" or any(name.endswith("ForSequenceClassification") for name in classes)

    def serves(self, head: ModelHead) -> bool:
        return super().serves(head) and head.problem != "regression"

    def example(self, row: Row) -> Labelled:
        pair = row.value.get("text_pair")
        several = row.value.get("labels")
        if several is not None and row.value.get("label") is not None:
            raise DataError(f"{row.place}: it has both 'label' and 'labels'; keep one of them.")
        label: str | tuple[str, ...]
        if several is not None:
            if not isinstance(several, list):
                raise DataError(
                    f"{row.place}: expected a list of labels under 'labels', got {type(several).__name__}. The one "
                    "label of a text stands under 'label': data.columns={label: labels}."
                )
            label = tuple(name_of_label(one, row.place, "labels") for one in several)
        elif isinstance(one := row.value.get("label"), list):
            raise DataError(
                f"{row.place}: expected a label under 'label', got {one!r:.60}. Several labels of a text stand under "
                "'labels': data.columns={labels: label}."
            )
        else:
            label = name_of_label(row.value.get("label"), row.place)
        return Labelled(
            row.source,
            row.number,
            label,
            text=text_of(row),
            pair=text_of(row, "text_pair") if pair is not None else None,
            form="text and labels" if several is not None else "text and label",
        )

    def rows(self, sources: Sequence[Source], reader: Any, notes: Notes) -> list[Labelled]:
        rows = super().rows(sources, reader, notes)
        flags = _are_flags(rows)
        if flags:
            notes.add(
                f"'labels' are read as {len(rows[0].labels)} flags, with 1 at the place of each label that a text has; "
                "data.choices names the labels in their order"
            )
        found = []
        for row in rows:
            if isinstance(row.label, tuple):
                has = [str(at) for at, flag in enumerate(row.label) if flag in _SET] if flags else row.label
                row = replace(row, label=tuple(dict.fromkeys(has)))
            found.append(row)
        return found

    def labels_of(self, training: Sequence[Labelled]) -> list[str] | None:
        mixed = {isinstance(row.label, tuple) for row in training}
        if len(mixed) > 1:
            odd = next(row for row in training if isinstance(row.label, tuple) != isinstance(training[0].label, tuple))
            raise DataError(f"{odd.place}: some rows have a 'label' and others 'labels'; give all rows a list of them.")
        return super().labels_of(training)

    def problem(self, inputs: Inputs) -> str:
        several = inputs.form == "text and labels"
        return "multi_label_classification" if several else "single_label_classification"

    def kind(self, example: Labelled, labels: Sequence[str] | None) -> Kind:
        return "labels" if isinstance(example.label, tuple) else "choice"

    def best(self, said: str, inputs: Inputs) -> Metric:
        several = self.problem(inputs) == "multi_label_classification"
        return METRICS["micro_f1"] if said == "auto" and several else super().best(said, inputs)

    def encode(
        self, examples: Sequence[Labelled], reader: Any, labels: Sequence[str] | None, max_length: int | None
    ) -> list[Tensors]:
        places = {label: number for number, label in enumerate(labels or ())}
        rows = _read_text.tokenised(examples, reader, max_length)
        for row, example in zip(rows, examples, strict=True):
            if isinstance(example.label, tuple):
                row["labels"] = [float(label in example.label) for label in places]
            else:
                row["labels"] = places[example.answer]
        return rows

    def require_readable(self, config: Any, rows: Sequence[Tensors], places: Sequence[str]) -> None:
        _read_text.require_ends(config, rows, places)

    def pad(self, rows: Sequence[Tensors], reader: Any) -> dict[str, Tensor]:
        return _read_text.padded(rows, reader)

    def costs(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return F.cross_entropy(logits, labels, reduction="none")

    def judge(self, logits: Sequence[Tensor], examples: Sequence[Labelled], labels: Sequence[str] | None) -> Judged:
        stacked = torch.stack(list(logits))
        several = isinstance(examples[0].label, tuple)
        return (judged_labels if several else judged_classes)(stacked, examples, list(labels or ()))

    def shown(self, row: Tensors, reader: Any, labels: Sequence[str] | None) -> tuple[tuple[str, bool], ...]:
        known, said = labels or (), row["labels"]
        marked = [known[said]] if isinstance(said, int) else [known[at] for at, one in enumerate(said) if one]
        return (_read_text.decoded(row, reader), False), (f" {', '.join(marked) or 'no label'}", True)

    def sample(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        return {**_read_text.sample(batch.rows, batch.length), "labels": torch.zeros(batch.rows, dtype=torch.int64)}


_SET, _UNSET = ("1", "true"), ("0", "false")


def _are_flags(rows: Sequence[Labelled]) -> bool:
    """Whether the lists of labels say of each label whether a text has it. Lists of numbers that are all of one length
    and name nothing but 0 and 1 would otherwise give every text both."""
    lengths = {len(row.label) if isinstance(row.label, tuple) else 0 for row in rows}
    return len(lengths) == 1 and min(lengths) > 1 and {one for row in rows for one in row.labels} <= {*_SET, *_UNSET}
