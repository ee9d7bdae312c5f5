"""What a model answers, shown: to be read by people, and to be read by programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trimtab.evaluation.answers import KEPT_SCORES
from trimtab.models.locate import ModelHead

_SHOWN = 5


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        fields: under the keys of rows (``label``, ``labels``, ``tags``, ``target``), and ``probabilities``.
        text: the same in a line.
        cut: whether the model did not read all of the row.
    """

    fields: Mapping[str, Any]
    text: str
    cut: bool = False


def of_logits(logits: Tensor, head: ModelHead) -> Answer:
    """The answer of a head with these ``logits``, ``[labels]``: a label, several, or a number."""
    if head.problem == "regression":
        told = f"{float(logits[0]):.7g}"  # as many digits as float32 has
        return Answer({"label": float(told)}, told)
    if head.problem == "multi_label_classification":
        shares = _shares(head.labels, logits.double().sigmoid())
        given = [label for label, share in shares.items() if share >= 0.5]
        told = ", ".join(f"{label} ({share:.1%})" for label, share in shares.items() if share >= 0.5)
        likeliest = max(shares, key=shares.__getitem__)
        return Answer(
            {"labels": given, "probabilities": _kept(shares)},
            told or f"no label (likeliest: {likeliest}, {shares[likeliest]:.1%})",
        )
    shares = _shares(head.labels, logits.double().softmax(-1))
    ordered = sorted(shares, key=lambda label: -shares[label])
    told = ", ".join(f"{label} ({shares[label]:.1%})" for label in ordered[:_SHOWN])
    return Answer({"label": ordered[0], "probabilities": _kept(shares)}, told + ", ..." * (len(ordered) > _SHOWN))


def _shares(labels: Sequence[str], shares: Tensor) -> dict[str, float]:
    return {label: round(share, 6) for label, share in zip(labels, shares.tolist(), strict=True)}


def _kept(shares: dict[str, float]) -> dict[str, float]:
    """All; of many labels the likeliest, as predictions have them."""
    best = sorted(shares, key=lambda label: -shares[label])[:KEPT_SCORES]
    return shares if len(shares) <= KEPT_SCORES else {label: shares[label] for label in best}
