"""Measure a model on labelled rows, and write down what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trimtab.data.choices import check_choices, infer_choices
from trimtab.data.rows import Example
from trimtab.errors import DataError
from trimtab.evaluation import answers
from trimtab.evaluation.answers import Judge, Outcome, prediction
from trimtab.evaluation.choice import score_choices
from trimtab.evaluation.generation import generate_answers
from trimtab.evaluation.metrics import choice_metrics
from trimtab.evaluation.perplexity import perplexity, token_loss
from trimtab.files import write_json, write_jsonl
from trimtab.tasks import Head

Progress = Callable[[int, int], None]

KEPT_SCORES = 20
"""Scores of a row that its prediction keeps."""


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of rows.

    Attributes:
        name: of the data set.
        result: the figures, ready for JSON; ``kind`` says which there are: choice, multiple_choice, generation or
            perplexity.
        predictions: one row each, in the order of the examples; none for perplexity alone.
    """

    name: str
    result: dict[str, Any]
    predictions: list[dict[str, Any]]


def evaluate(
    model: Any,
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
    head: Head | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure ``model`` on ``examples``.

    With choices, each is scored by its log-likelihood (`choice.py`), or, if asked to, the model writes and the choice
    that it names is read (`answers.py`). Rows with choices of their own have these scored; there is no class then, and
    so no F1, but the accuracy by the log-likelihood per character, too. Without any, answers are generated and compared
    (`generation.py`). Rows without an answer, plain texts, have a perplexity only; one such row among others suffices.
    The perplexity of choices is that of the true answers' tokens, with the end token where it is scored.

    Args:
        model: a transformers causal language model; its modules' training modes stay as they are.
        tokenizer: its fast tokenizer.
        examples: at least one row.
        name: of the data set.
        choices: the closed set of answers; ``"infer"`` to look for one in the rows; None for open answers, or for
            rows that bring their own choices, all of them.
        generate: let the model write its answer also where there are choices.
        judge: what makes figures of open answers; by default, exact match.
        batch_size: most sequences in a forward pass. No prediction and no metric of them depends on it; scores and
            perplexity move by their rounding (a few hundredths of a nat in bfloat16).
        max_new_tokens: limit of a generated answer.
        max_length: most tokens of a row; None, or more than the model has positions for: what the model has.
        head: made of this model before, to spare the probe.
        progress: called with the number of rows done and of all rows.

    Raises:
        DataError: there are no rows, or a row or the choices cannot be used; the message names the row.
        ModelError: the model's output is not a number.
    """
    if not examples:
        raise DataError(f"{name}: there are no rows to evaluate.")
    started = time.perf_counter()
    head = head if head is not None else Head(model)
    limit = _limit(model, max_length)
    own = all(example.choices for example in examples)
    closed = (None if own else infer_choices(examples)) if choices == "infer" else choices
    if (closed is not None or own) and not generate:
        result, predictions = _choice(head, tokenizer, examples, closed, batch_size, limit, progress)
    elif any(example.answer is None for example in examples):
        result, predictions = _perplexity(head, tokenizer, examples, batch_size, limit, progress)
    else:
        if closed is not None:
            judge = partial(answers.labels, known=check_choices(closed, examples))
        result, predictions = _written(head, tokenizer, examples, judge, batch_size, limit, max_new_tokens, progress)
    kind = {"kind": result.pop("kind"), "dataset": name, "rows": len(examples)}
    return Evaluation(name, {**kind, **result, "seconds": round(time.perf_counter() - started, 3)}, predictions)


def write(evaluation: Evaluation, folder: Path | str, stage: str) -> None:
    """Write ``evaluation/NAME.STAGE.json`` and, if there are any, ``predictions/NAME.STAGE.jsonl`` into a run folder.

    Args:
        evaluation: what `evaluate` returned.
        folder: the run folder; made if missing.
        stage: ``"before"`` or ``"after"``.
    """
    write_json(Path(folder) / "evaluation" / f"{evaluation.name}.{stage}.json", evaluation.result)
    if evaluation.predictions:
        write_jsonl(Path(folder) / "predictions" / f"{evaluation.name}.{stage}.jsonl", evaluation.predictions)


def _choice(
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    closed: Sequence[str] | None,
    batch_size: int,
    limit: int | None,
    progress: Progress | None,
) -> Outcome:
    """Choices scored: those of a closed set, or with None each row's own."""
    clean = None if closed is None else check_choices(closed, examples)
    found = score_choices(head, tokenizer, examples, clean, batch_size=batch_size, max_length=limit, progress=progress)
    predictions = []
    for index, (example, best, scores) in enumerate(zip(examples, found.best(), found.scores, strict=True)):
        choices = clean if clean is not None else example.choices
        row = prediction(index, example, choices[best], choices[best] == example.answer)
        predictions.append({**row, "scores": _best_scores(choices, scores)})
    if clean is not None:
        truth = [str(example.answer) for example in examples]
        metrics = choice_metrics(truth, [row["predicted"] for row in predictions], clean)
        result = {"kind": "choice", "choices": clean, **metrics}
    else:
        by_length = zip(examples, found.best_by_length(examples), strict=True)
        result = {
            "kind": "multiple_choice",
            "accuracy": sum(row["correct"] for row in predictions) / len(examples),
            "accuracy_norm": sum(row.choices[best] == row.answer for row, best in by_length) / len(examples),
            "chance": sum(1 / len(example.choices) for example in examples) / len(examples),
        }
    return {**result, "perplexity": perplexity(found.loss, found.tokens)}, predictions


def _best_scores(choices: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """The scores of all choices, in their order; of more than ``KEPT_SCORES``, of the best so many."""
    found = {choice: round(score, 6) for choice, score in zip(choices, scores, strict=True)}
    best = sorted(found, key=found.__getitem__, reverse=True)[:KEPT_SCORES]
    return {choice: found[choice] for choice in best} if len(found) > KEPT_SCORES else found


def _perplexity(
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    batch_size: int,
    limit: int | None,
    progress: Progress | None,
) -> Outcome:
    loss, tokens = token_loss(head, tokenizer, examples, batch_size=batch_size, max_length=limit, progress=progress)
    return {"kind": "perplexity", "perplexity": perplexity(loss, tokens), "tokens": tokens}, []


def _written(
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    judge: Judge,
    batch_size: int,
    limit: int | None,
    max_new_tokens: int,
    progress: Progress | None,
) -> Outcome:
    written = generate_answers(
        head,
        tokenizer,
        examples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_length=limit,
        progress=progress,
    )
    result, predictions = judge(examples, written)
    loss, tokens = token_loss(head, tokenizer, examples, batch_size=batch_size, max_length=limit)
    return {**result, "perplexity": perplexity(loss, tokens)}, predictions


def _limit(model: Any, max_length: int | None) -> int | None:
    """The smaller of what the caller allows and how many positions the model has; None if neither is known."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    known = [limit for limit in (max_length, positions) if limit is not None and limit > 0]
    return min(known, default=None)
