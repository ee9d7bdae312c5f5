"""Judges the answers of a model: the choices that it scored best, and the labels, numbers and texts that it wrote.

A label that is written has to stand as words of its own, in upper or lower case, in the first line that is not empty; a
model that writes on after its answer adds other text below. An answer that names no label, or two, is unusable. It
counts as wrong and is also counted apart. It is never a class of its own, so F1 is computed over the true labels alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from trimtab.data.rows import Answered, Example
from trimtab.evaluation.choice import ChoiceScores
from trimtab.evaluation.closed_set import class_details
from trimtab.evaluation.generation import Generated, same_answer
from trimtab.metrics import Kind
from trimtab.outcomes import Outcomes
from trimtab.runs.results import Prediction


@dataclass(frozen=True)
class Judged:
    """The judged rows of a data set, from which a result is computed.

    Attributes:
        kind: the kind of the result.
        outcomes: what its metrics are computed from.
        rows: a prediction for each row.
        details: the other fields of the result, by name.
    """

    kind: Kind
    outcomes: Outcomes
    rows: list[Prediction]
    details: dict[str, Any] = field(default_factory=dict)

    def with_loss(self, loss: float, tokens: int) -> Outcomes:
        """The outcomes, with the summed loss of so many tokens or labels."""
        return replace(self.outcomes, loss=loss, tokens=tokens)


Judge = Callable[[Sequence[Example], Sequence[Generated]], Judged]
"""Judges the answers that were written to some rows."""

KEPT_SCORES = 20
"""Most scores that a prediction keeps."""

_NUMBER = re.compile(r"[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def prediction(index: int, example: Answered, predicted: str, correct: bool | None, **more: Any) -> Prediction:
    """The prediction of the row at ``index``."""
    return Prediction(
        row=index + 1,
        prompt=example.prompt,
        answer=str(example.answer),
        predicted=predicted,
        correct=correct,
        **more,
    )


def chosen(scored: ChoiceScores, examples: Sequence[Example], closed: Sequence[str] | None) -> Judged:
    """The rows judged by the scores of the ``closed`` set, or of each row's own choices if that is None."""
    sets = [closed if closed is not None else example.choices for example in examples]
    rows = [
        prediction(at, example, choices[best], choices[best] == example.answer, scores=_best_scores(choices, scores))
        for at, (example, choices, best, scores) in enumerate(
            zip(examples, sets, scored.best, scored.scores, strict=True)
        )
    ]
    outcomes = Outcomes(truth=[row.answer for row in rows], predicted=[row.predicted for row in rows])
    if closed is not None:
        outcomes = replace(outcomes, choices=closed)
        return Judged("choice", outcomes, rows, class_details(outcomes))
    by_length = [choices[best] for choices, best in zip(sets, scored.best_by_length, strict=True)]
    chance = sum(1 / len(choices) for choices in sets) / len(sets)
    return Judged("multiple_choice", replace(outcomes, by_length=by_length), rows, {"chance": chance})


def _best_scores(choices: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """The scores of all choices, in their order; if there are more than ``KEPT_SCORES``, of the best ones."""
    rounded = {choice: round(score, 6) for choice, score in zip(choices, scores, strict=True)}
    best = sorted(rounded, key=rounded.__getitem__, reverse=True)[:KEPT_SCORES]
    return {choice: rounded[choice] for choice in best} if len(rounded) > KEPT_SCORES else rounded


def label_reader(labels: Sequence[str]) -> Callable[[str], str | None]:
    """A function that returns the one of ``labels`` that the first line of a text names, or None if none or several.

    Case matters for a label of one letter only (``A`` is an answer, ``a`` an article).
    """
    ordered = sorted(labels, key=len, reverse=True)  # "strong negative" before "negative"
    patterns = [r"\s+".join(map(re.escape, label.split())) for label in ordered]
    marked = [f"({p})" if len(label) == 1 else f"((?i:{p}))" for p, label in zip(patterns, ordered, strict=True)]
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(marked)})(?!\w)")

    def read(text: str) -> str | None:
        named = {ordered[match.lastindex - 1] for match in pattern.finditer(_first_line(text)) if match.lastindex}
        return named.pop() if len(named) == 1 else None

    return read


def exact(examples: Sequence[Example], answers: Sequence[Generated]) -> Judged:
    """Open answers: the whole text must match. One that is empty or has no end is unusable."""
    return _open(examples, answers, same_answer, lambda answer: answer.usable)


def labels(
    examples: Sequence[Example], answers: Sequence[Generated], *, known: Sequence[str], several: bool = False
) -> Judged:
    """Labels of the closed set ``known``: one for each row, or ``several``, separated by commas or line breaks.

    Several are counted one by one: a missing one is unusable, and any beyond the true number is ignored.
    """
    read = label_reader(known)
    truth: list[str] = []
    labels_read: list[str | None] = []
    rows = []
    for index, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        true = parts(str(example.answer)) if several else [str(example.answer)]
        said = [read(part) for part in (parts(answer.text) if several else [answer.text])][: len(true)]
        said += [None] * (len(true) - len(said))
        as_read = said if several else said[0]
        rows.append(prediction(index, example, answer.text, said == true, usable=None not in said, read_as=as_read))
        truth += true
        labels_read += said
    outcomes = Outcomes(
        truth=truth,
        predicted=[label or "" for label in labels_read],
        choices=list(known),
        usable=[label is not None for label in labels_read],
    )
    counted = {"answers": len(truth)} if several else {}
    return Judged("choice", outcomes, rows, {**counted, **class_details(outcomes)})


def numbers(examples: Sequence[Example], answers: Sequence[Generated]) -> Judged:
    """Numbers: the first one in the first line must equal the true one; currency signs and commas do not count.

    An answer without a number is unusable.
    """

    def same(text: str, true: str) -> bool:
        wanted, line = _number(true), _first_line(text)
        return same_answer(line, true) if wanted is None else _number(line) == wanted

    return _open(examples, answers, same, lambda answer: _number(_first_line(answer.text)) is not None)


def formulas(examples: Sequence[Example], answers: Sequence[Generated]) -> Judged:
    """Formulas: the first line must match, apart from white space and case. An empty answer is unusable."""

    def same(text: str, true: str) -> bool:
        return "".join(_first_line(text).casefold().split()) == "".join(true.casefold().split())

    return _open(examples, answers, same, lambda answer: _first_line(answer.text) != "")


def texts(examples: Sequence[Example], answers: Sequence[Generated]) -> Judged:
    """Explanations: exact matches, and the mean F1 over the words in common. An empty answer is unusable."""
    return _open(examples, answers, same_answer, lambda answer: answer.text != "", explanations=True)


def written_texts(examples: Sequence[Example], answers: Sequence[Generated]) -> Judged:
    """Texts that are near the true one or far from it: exact matches, and how much of it they share."""
    return _open(examples, answers, same_answer, lambda answer: answer.usable, overlaps=True)


def parts(text: str) -> list[str]:
    """The answers in a text with several, which are separated by commas or line breaks."""
    return [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]


def _open(
    examples: Sequence[Example],
    answers: Sequence[Generated],
    same: Callable[[str, str], bool],
    usable: Callable[[Generated], bool],
    *,
    explanations: bool = False,
    overlaps: bool = False,
) -> Judged:
    rows = [
        prediction(index, example, answer.text, same(answer.text, str(example.answer)), usable=usable(answer))
        for index, (example, answer) in enumerate(zip(examples, answers, strict=True))
    ]
    outcomes = Outcomes(
        truth=[row.answer for row in rows],
        predicted=[row.predicted for row in rows],
        correct=[row.correct for row in rows],
        usable=[row.usable for row in rows],
        explanations=explanations,
        overlaps=overlaps,
    )
    return Judged("generation", outcomes, rows)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _number(text: str) -> Decimal | None:
    match = _NUMBER.search(text)
    return Decimal(re.sub(r"[$,]", "", match[0])) if match else None
