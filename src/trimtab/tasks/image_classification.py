"""Classification of pictures: each has one label.

Rows are ``{"image": "a.png", "label": ...}``, or a folder that has a folder of pictures for each label. The model's own
image processor makes them the size that it takes; grey, transparent and turned pictures become three upright channels.
Nothing is drawn at random: there is no augmentation. The loss is the cross-entropy of the label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.config.resolve import Job
from trimtab.data.labelled import Labelled, name_of_label
from trimtab.data.pictures import left_out, opened, picture_of
from trimtab.data.rows import Row, Source
from trimtab.data.sources import folder_of
from trimtab.errors import ModelError
from trimtab.evaluation.answers import Judged
from trimtab.models.heads import Family
from trimtab.notes import Notes
from trimtab.tasks import _labelled
from trimtab.tasks._encoded import Tensors
from trimtab.tasks._inputs import Inputs
from trimtab.tasks._judged import judged_classes
from trimtab.tasks._sizes import Batch, RowSizes


class ImageClassification(_labelled.LabelledTask):
    """One label of a picture."""

    model_class = "AutoModelForImageClassification"
    metrics = ("loss", "accuracy", "macro_f1")
    keys = ("image", "label")
    precedence = 10
    input_key = "image"
    counted = "pictures"

    def suits(self, family: Family, classes: Sequence[str], row: Mapping[str, Any] | None) -> bool:
        return family == "image"

    def example(self, row: Row) -> Labelled:
        image, content = picture_of(row.value.get("image"), row.place, folder_of(row, Path()))
        label = name_of_label(row.value.get("label"), row.place)
        named = row.value["image"] if isinstance(row.value["image"], str) else image
        return Labelled(
            row.source, row.number, label, image=image, named=named, content=content, form="image and label"
        )

    def rows(self, sources: Sequence[Source], reader: Any, notes: Notes) -> list[Labelled]:
        rows = super().rows(sources, reader, notes)
        for folder in dict.fromkeys(row.source for row in rows):
            if Path(folder).is_dir():
                for sentence in left_out(Path(folder)):
                    notes.add(sentence)
        return rows

    def problem(self, inputs: Inputs) -> str:
        return "single_label_classification"

    def encode(
        self, examples: Sequence[Labelled], reader: Any, labels: Sequence[str] | None, max_length: int | None
    ) -> list[Tensors]:
        places = {label: number for number, label in enumerate(labels or ())}
        # Pictures are opened when their batch is made: all of them at once would not fit.
        return [{"picture": example, "labels": places.get(example.answer, 0)} for example in examples]

    def pad(self, rows: Sequence[Tensors], reader: Any) -> dict[str, Tensor]:
        return {"pixel_values": _pixels([row["picture"] for row in rows], reader)}

    def costs(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def judge(self, logits: Sequence[Tensor], examples: Sequence[Labelled], labels: Sequence[str] | None) -> Judged:
        return judged_classes(torch.stack(list(logits)), examples, list(labels or ()))

    def tokens(self, row: Mapping[str, Any]) -> int:
        return 1

    def described(self, row: Tensors) -> str:
        return "a picture"

    def shown(self, row: Tensors, reader: Any, labels: Sequence[str] | None) -> tuple[tuple[str, bool], ...]:
        shape = " x ".join(map(str, _pixels([row["picture"]], reader).shape[1:]))
        return (f"{row['picture'].image} ({shape})", False), (f" {(labels or ())[row['labels']]}", True)

    def sizes(self, job: Job, inputs: Inputs) -> RowSizes:
        return self.largest(job)

    def largest(self, job: Job) -> RowSizes:
        from PIL import Image

        shape = _processed([Image.new("RGB", (64, 64))], job.reader).shape[1:]
        data = job.config.data
        return RowSizes(1, 1, bool(data.test or data.validation), shape=tuple(shape))

    def sample(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        dtype = next(model.parameters()).dtype
        pixels = torch.zeros(batch.rows, *batch.shape, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(batch.rows, dtype=torch.int64)}

    def logits(self, head: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return super().logits(head, {**batch, "pixel_values": batch["pixel_values"].to(head.dtype)})


def _pixels(examples: Sequence[Labelled], processor: Any) -> Tensor:
    return _processed([opened(example.place, example.image, example.content) for example in examples], processor)


def _processed(images: Sequence[Any], processor: Any) -> Tensor:
    """``[pictures, channels, height, width]``, as the model takes them. Raises ModelError for a processor that makes
    something else of a picture."""
    try:
        pixels: Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
    except ValueError as error:
        raise ModelError(
            f"this model's {type(processor).__name__} does not take pictures of three channels ({error}); take a model "
            "of coloured pictures"
        ) from None
    if pixels.dim() != 4:
        raise ModelError(
            f"this model's {type(processor).__name__} cuts a picture into pieces of the shape "
            f"{list(pixels.shape[1:])}, and sorting pictures takes models that read [channels, height, width]; take a "
            "model of one size of pictures"
        )
    return pixels
