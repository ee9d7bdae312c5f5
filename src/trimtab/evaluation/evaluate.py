"""Measures a model on labelled rows, and writes the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trimtab.data.batches import Collator, by_length
from trimtab.data.choices import closed_set
from trimtab.data.rows import Example
from trimtab.data.tokens import encode_all
from trimtab.errors import DataError, ModelError
from trimtab.evaluation import answers
from trimtab.evaluation.answers import Judge, Judged
from trimtab.evaluation.choice import score_choices
from trimtab.evaluation.generation import generate_answers
from trimtab.evaluation.shortened import shortened
from trimtab.files import write_jsonl
from trimtab.metrics import measure as compute_metrics
from trimtab.models.causal_head import IGNORED, Head
from trimtab.models.positions import positions_of
from trimtab.outcomes import Outcomes
from trimtab.processes import divided
from trimtab.runs.results import RESULTS, Measured, Prediction, Result
from trimtab.surgery.contexts import evaluating

Progress = Callable[[int, int], None]
"""Called with the number of rows done and of all rows."""


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of rows.

    Attributes:
        name: of the data set.
        record: the result, with its figures.
        rows: a prediction for each example; none if only the perplexity is measured.
    """

    name: str
    record: Result
    rows: list[Prediction]

    @property
    def result(self) -> dict[str, Any]:
        """The record as plain values, as in its file."""
        return self.record.plain()

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """The rows as plain values, as in their file."""
        return [row.plain() for row in self.rows]


def evaluate(
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    name: str,
    choices: Sequence[str] | Literal["infer"] | None = None,
    generate: bool = False,
    judge: Judge = answers.exact,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    max_length: int | None = None,
    static_cache: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the model of ``head`` on ``examples``.

    Choices are scored by their log-likelihood (`choice.py`). With ``generate``, the model writes instead, and the
    choice that it names is read (`answers.py`). Choices of a row's own form no classes, so they have no F1, but they
    have a second accuracy, by the log-likelihood per character. Open answers are generated (`generation.py`) and
    judged. If a row has no answer, the rows are plain texts, and only their perplexity is measured. The perplexity of
    choices is over the tokens of the true answers, including the end token where it is scored.

    Args:
        head: the model; its modules' training modes stay as they are.
        tokenizer: its fast tokenizer.
        examples: at least one row.
        name: of the data set.
        choices: the closed set of answers; ``"infer"`` to look for one in the rows; None for open answers, or if all
            rows have choices of their own.
        generate: let the model write its answer even if there are choices.
        judge: judges open answers; the default is an exact match.
        batch_size: most sequences in a forward pass. Predictions and their metrics do not depend on it; scores and
            perplexity change by rounding (a few hundredths of a nat in bfloat16).
        max_new_tokens: the limit of a generated answer.
        max_length: most tokens of a row, as far as the model can read; by default what it was made for.
        static_cache: answers are written with keys and values in tensors of a fixed size (`generation.greedy`).
        progress: called as the rows get done.

    Raises:
        DataError: there are no rows, or a row or the choices cannot be used; the message names the row.
        ModelError: the model's output is not a number.
    """
    if not examples:
        raise DataError(f"{name}: there are no rows to evaluate.")
    started = time.perf_counter()
    settings: dict[str, Any] = {"batch_size": batch_size, "max_length": positions_of(head.model).limit(max_length)}
    limit, closed = settings["max_length"], closed_set(choices, examples)
    writes = False
    with evaluating(head.model):
        if (closed is not None or all(example.choices for example in examples)) and not generate:
            scored = score_choices(head, tokenizer, examples, closed, progress=progress, **settings)
            judged, loss, tokens = answers.chosen(scored, examples, closed), scored.loss, scored.tokens
        elif any(example.answer is None for example in examples):
            loss, tokens = token_loss(head, tokenizer, examples, progress=progress, **settings)
            judged = Judged("perplexity", Outcomes(), [], {"tokens": tokens})
        else:
            writes = True
            if closed is not None:
                judge = partial(answers.labels, known=closed)
            settings["progress"] = progress
            limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "static_cache": static_cache}
            written = generate_answers(head, tokenizer, examples, **limits, **settings)
            judged = judge(examples, written)
            loss, tokens = token_loss(head, tokenizer, examples, **{**settings, "progress": None})
    outcomes = judged.with_loss(checked(loss, tokens), tokens)
    short = shortened(examples, tokenizer, limit, max_new_tokens if writes else None)
    lengths = {"cut": short.cut, "left_out": len(short.left_out)}
    record = RESULTS[judged.kind](
        kind=judged.kind,
        dataset=name,
        rows=len(examples),
        figures=compute_metrics(judged.kind, outcomes),
        seconds=round(time.perf_counter() - started, 3),
        **judged.details,
        **{name: count for name, count in lengths.items() if count},
    )
    return Evaluation(name, record, judged.rows)


def write(evaluation: Evaluation, folder: Path | str, stage: str, measured: Measured | None = None) -> None:
    """Write ``evaluation/NAME.STAGE.json`` and any predictions, ``predictions/NAME.STAGE.jsonl``, into a run folder.

    ``stage`` is ``"before"`` or ``"after"``; ``measured``: what the result says that it is of.
    """
    record = evaluation.record.updated(**measured._asdict()) if measured is not None else evaluation.record
    if evaluation.rows:
        write_jsonl(Path(folder) / "predictions" / f"{evaluation.name}.{stage}.jsonl", evaluation.predictions)
    # Last, since it says that the test set is evaluated.
    record.write_to(Path(folder) / "evaluation" / f"{evaluation.name}.{stage}.json")


def token_loss(
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> tuple[float, int]:
    """The summed loss, in nats, of all trained tokens of the examples, and the number of these tokens.

    Called inside ``evaluating(head.model)``. Rows without a trained token are left out; DataError is raised if no row
    has one. ``batch_size`` changes the speed, and the last digits. Longer rows are cut to ``max_length`` tokens as
    ``trimtab.data.tokens.encode`` says.
    """
    rows = encode_all(examples, tokenizer, max_length)
    collate = Collator(pad_id=0)
    device = head.model.get_input_embeddings().weight.device
    total, tokens, done = 0.0, 0, 0

    def run(indices: list[int]) -> tuple[float, int]:
        batch = collate([rows[index] for index in indices])
        loss = head.loss_at_labels(batch["input_ids"].to(device), batch["labels"].to(device), num_items=1)
        return float(loss), int((batch["labels"] != IGNORED).sum())

    for indices, (loss, count) in divided(by_length(rows.lengths, batch_size), run, one_pass=True):
        total, tokens, done = total + loss, tokens + count, done + len(indices)
        if progress is not None:
            progress(done, len(rows))
    return total, tokens


def checked(loss: float, tokens: int) -> float:
    """``loss``, which is summed over ``tokens``. Raises ModelError if it is not a number."""
    if not math.isfinite(loss):
        raise ModelError(
            f"The loss of the model over {tokens} tokens is {loss}, not a number. Its weights are damaged or its "
            "training diverged; train with a lower learning rate."
        )
    return loss
