"""Causal language modelling: the model reads a text from left to right and learns to write its answers.

Rows are of any form in `trimtab.data.forms`. The loss is the cross-entropy of the answers' tokens; those of the prompts
may count a little, too. Nothing is trained beside the adapter: the model brings its own head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab import metrics
from trimtab.config.resolve import Job
from trimtab.data.batches import Collator
from trimtab.data.packing import LAYOUT, PackingCollator
from trimtab.data.preview import Preview, preview
from trimtab.data.rows import Example
from trimtab.evaluation.evaluate import Evaluation, Progress, checked, evaluate, token_loss
from trimtab.models.causal_head import IGNORED, Head
from trimtab.models.head_loss import FROZEN_CHUNK
from trimtab.models.heads import Family
from trimtab.outcomes import Outcomes
from trimtab.runs.events import Listener
from trimtab.surgery.contexts import evaluating
from trimtab.tasks import _inputs, _task
from trimtab.tasks._sizes import Batch, RowSizes, with_most_characters
from trimtab.tasks._texts import read_inputs


class CausalLM(_task.Task):
    """The next token, from all that came before it."""

    model_class = "AutoModelForCausalLM"
    metrics = tuple(metrics.choosing())
    precedence = 90
    writes = True
    checked_as_texts = True

    def suits(self, family: Family, classes: Sequence[str], row: Mapping[str, Any] | None) -> bool:
        return True

    def read(self, job: Job, reader: Any, listener: Listener) -> _inputs.Inputs:
        return read_inputs(job.config, reader, listener, job.max_length)

    def collator(self, reader: Any, *, prompts: bool = False) -> Collator:
        return Collator(reader.pad_token_id, prompts=prompts, positions=True)

    def packer(self, reader: Any, *, prompts: bool = False, flash: bool = False) -> PackingCollator:
        return PackingCollator(prompts=prompts, flash=flash)

    def head(self, model: Any) -> Head:
        return Head(model)

    def loss(
        self, head: Head, batch: Mapping[str, Tensor], *, count: int | Tensor | None = None, prompt_weight: float = 0.0
    ) -> Tensor:
        """The cross-entropy of ``batch["labels"]``; a token of ``batch["prompt_labels"]`` counts ``prompt_weight``
        beside 1 of the others, and not in ``count`` (arXiv 2405.14394 trains on both alike)."""
        return head.loss_at_labels(
            batch["input_ids"],
            batch["labels"],
            num_items=count,
            lesser=batch.get("prompt_labels"),
            weight=prompt_weight,
            layout={key: batch[key] for key in LAYOUT if key in batch},
            at=batch.get("label_positions"),
            lesser_at=batch.get("prompt_positions"),
        )

    def evaluate(self, head: Head, reader: Any, examples: Sequence[Example], how: _task.Measurement) -> Evaluation:
        return evaluate(
            head,
            reader,
            examples,
            name=how.name,
            choices=how.choices,
            batch_size=how.evaluation.batch_size,
            max_new_tokens=how.evaluation.max_new_tokens,
            static_cache=how.evaluation.static_cache,
            max_length=how.max_length,
            progress=how.progress,
        )

    def validation(
        self,
        head: Head,
        reader: Any,
        examples: Sequence[Example],
        *,
        inputs: _inputs.Inputs,
        job: Job,
        progress: Progress,
    ) -> Mapping[str, float]:
        if inputs.scored:
            return super().validation(head, reader, examples, inputs=inputs, job=job, progress=progress)
        loss, tokens = self._token_loss(head, reader, examples, job)
        return metrics.of_validation(metrics.measure("perplexity", Outcomes(loss=loss, tokens=tokens)))

    def validation_loss(
        self, head: Head, reader: Any, examples: Sequence[Example], *, inputs: _inputs.Inputs, job: Job
    ) -> float:
        loss, tokens = self._token_loss(head, reader, examples, job)
        return loss / tokens

    def _token_loss(self, head: Head, reader: Any, examples: Sequence[Example], job: Job) -> tuple[float, int]:
        size, length = job.config.evaluation.batch_size, job.max_length
        with evaluating(head.model):
            loss, tokens = token_loss(head, reader, examples, batch_size=size, max_length=length)
        return checked(loss, tokens), tokens

    def preview(self, inputs: _inputs.Inputs, reader: Any) -> Preview:
        return preview(inputs.rows, reader)

    def sizes(self, job: Job, inputs: _inputs.Inputs) -> RowSizes:
        lengths = inputs.rows.lengths
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[: job.config.train.batch_size]
        labels = sum(label != IGNORED for row in longest for label in inputs.rows[row]["labels"])
        tested = [example for rows in inputs.tests.values() for example in rows]
        generates = not inputs.scored and any(example.answer is not None for example in tested)
        new = job.config.evaluation.max_new_tokens if generates else 0
        measured = [
            _measured(inputs.validation, job.reader, inputs.choices, limit=job.max_length),
            _measured(tested, job.reader, inputs.choices, limit=job.reading_length, new=new),
        ]
        return RowSizes(
            max(lengths),
            math.ceil(labels / len(longest)),
            bool(inputs.validation or tested),
            generates,
            tested=max(length for length, _ in measured),
            tested_labels=max(labels for _, labels in measured),
        )

    def sample(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        shape = (1, batch.rows * batch.length) if batch.packed else (batch.rows, batch.length)
        ids = torch.zeros(shape, dtype=torch.int64)
        found = {"input_ids": ids, "labels": torch.zeros_like(ids)}
        return found | ({"position_ids": torch.arange(shape[1])[None] % batch.length} if batch.packed else {})

    def logits_at_once(self, model: Any, labels: int) -> int:
        return min(labels, FROZEN_CHUNK) * int(model.config.get_text_config().vocab_size)

    def foresee(self, head: Head, batch: Mapping[str, Tensor], *, generates: bool) -> Any:
        if generates:  # keys and values are kept
            return head.model(input_ids=batch["input_ids"], use_cache=True, logits_to_keep=1)
        return super().foresee(head, batch, generates=generates)


def _measured(
    rows: Sequence[Example], reader: Any, choices: Sequence[str] | None, *, limit: int | None, new: int = 0
) -> tuple[int, int]:
    """Tokens of the longest of ``rows``, with the ``new`` ones that are written to it, as far as ``limit`` goes; and
    how many tokens of such a row carry loss."""
    if not rows:
        return 0, 0

    def longest(row: Example) -> str:
        return max(row.text, row.prompt + max(row.choices or choices or ("",), key=len), key=len)

    few = with_most_characters(rows, lambda row: len(longest(row)))
    whole = reader([longest(row) for row in few], verbose=False)["input_ids"]
    prompts = reader([row.prompt for row in few], verbose=False)["input_ids"]
    sizes = [(len(ids) + 1, len(prompt)) for ids, prompt in zip(whole, prompts, strict=True)]  # 1 for an end
    length = max(max(tokens, prompt + new) for tokens, prompt in sizes)
    labels = max(tokens - prompt for tokens, prompt in sizes)
    return (length, labels) if limit is None else (min(length, limit), min(labels, limit))
