"""Logits of a head, judged: one class each, or several labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from trimtab.data.labelled import Labelled
from trimtab.evaluation.answers import KEPT_SCORES, Judged, prediction
from trimtab.evaluation.closed_set import class_details
from trimtab.outcomes import Outcomes
from trimtab.runs.results import class_scores


def judged_classes(logits: Tensor, examples: Sequence[Labelled], labels: Sequence[str]) -> Judged:
    """One class each: the likeliest. ``logits``: ``[rows, labels]``."""
    shares = logits.log_softmax(-1)
    rows = [
        prediction(at, example, labels[best], labels[best] == example.answer, scores=_best(labels, scores))
        for at, (example, best, scores) in enumerate(
            zip(examples, logits.argmax(-1).tolist(), shares.tolist(), strict=True)
        )
    ]
    outcomes = Outcomes(
        truth=[row.answer for row in rows],
        predicted=[row.predicted for row in rows],
        choices=labels,
        probabilities=shares.double().exp().numpy(),
    )
    return Judged("choice", outcomes, rows, class_details(outcomes))


def judged_labels(logits: Tensor, examples: Sequence[Labelled], labels: Sequence[str]) -> Judged:
    """Several labels each: those at least as likely as not. ``logits``: ``[rows, labels]``."""
    given = [[label for label, one in zip(labels, row, strict=True) if one >= 0] for row in logits.tolist()]
    rows = [
        prediction(at, example, ", ".join(said), set(said) == set(example.labels), scores=_best(labels, scores))
        for at, (example, said, scores) in enumerate(zip(examples, given, F.logsigmoid(logits).tolist(), strict=True))
    ]
    outcomes = Outcomes(
        truth=[row.answer for row in rows],
        predicted=[row.predicted for row in rows],
        choices=labels,
        correct=[row.correct for row in rows],
        true_labels=[list(example.labels) for example in examples],
        given_labels=given,
    )
    per_class = class_scores(labels, outcomes.label_figures)
    return Judged("labels", outcomes, rows, {"choices": list(labels), "per_class": per_class})


def _best(labels: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """The log-probability of each label; of the likeliest ones, where there are many."""
    likeliest = sorted(range(len(labels)), key=lambda at: -scores[at])[:KEPT_SCORES]
    return {labels[at]: round(scores[at], 6) for at in (sorted(likeliest) if len(labels) <= KEPT_SCORES else likeliest)}
