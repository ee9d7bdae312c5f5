"""What a model wrote, read and judged: which label is it, which number, and is it the right one?

A label counts where it stands as words of their own, in any case, in the first line that is not empty: a model that
finds no end goes on with something else. A text that names no label, or two, is unusable. That is a wrong answer, and
it is counted apart; it never becomes a class, so F1 is over the true labels alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from trimtab.data.rows import Example
from trimtab.evaluation.closed_set import class_details
from trimtab.evaluation.generation import Generated, same_answer
from trimtab.metrics import Kind, Outcomes
from trimtab.runs.results import Prediction


@dataclass(frozen=True)
class Judged:
    """Rows with what the model made of each, from which a result is computed.

    Attributes:
        kind: of the result.
        outcomes: what its metrics are computed from.
        rows: a prediction for each.
        details: the other fields of the result, by name.
    """

    kind: Kind
    outcomes: Outcomes
    rows: list[Prediction]
    details: dict[str, Any] = field(default_factory=dict)


Judge = Callable[[Sequence[Example], Sequence[Generated]], Judged]
"""Judges what was written to each of the rows."""

_NUMBER = re.compile(r"[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def prediction(index: int, example: Example, predicted: str, correct: bool, **more: Any) -> Prediction:
    """The prediction of the row at ``index``."""
    return Prediction(
        row=index + 1,
        prompt=example.prompt,
        answer=str(example.answer),
        predicted=predicted,
        correct=correct,
        **more,
    )


def label_reader(labels: Sequence[str]) -> Callable[[str], str | None]:
    """A function from a text to the one of ``labels`` that its first line names; None where that is none or several.

    Upper and lower case are the same but for a label of one letter (``A`` is an answer, ``a`` an article).
    """
    ordered = sorted(labels, key=len, reverse=True)  # "strong negative" before "negative"
    patterns = [r"\s+".join(map(re.escape, label.split())) for label in ordered]
    marked = [f"({p})" if len(label) == 1 else f"((?i:{p}))" for p, label in zip(patterns, ordered, strict=True)]
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(marked)})(?!\w)")

    def read(text: str) -> str | None:
        found = {ordered[match.lastindex - 1] for match in pattern.finditer(_first_line(text)) if match.lastindex}
        return found.pop() if len(found) == 1 else None

    return read


def exact(examples: Sequence[Example], answers: Sequence[Generated]) -> Judged:
    """Open answers: the whole text must match. Unusable: empty, or without an end."""
    return _open(
        prediction(index, example, answer.text, same_answer(answer.text, str(example.answer)), usable=answer.usable)
        for index, (example, answer) in enumerate(zip(examples, answers, strict=True))
    )


def labels(
    examples: Sequence[Example], answers: Sequence[Generated], *, known: Sequence[str], several: bool = False
) -> Judged:
    """Labels of a closed set ``known``, one a row, or ``several``, separated by commas (or line by line).

    Of several, answer by answer is counted: one that is missing is unusable, and any beyond the true number is ignored.
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
    """The first number of the first line must have the value of the true one; signs of currency and commas do not
    count. Unusable: no number."""

    def same(text: str, true: str) -> bool:
        wanted = _number(true)
        return same_answer(text, true) if wanted is None else _number(text) == wanted

    return _first_lines(examples, answers, same, lambda text: _number(text) is not None)


def formulas(examples: Sequence[Example], answers: Sequence[Generated]) -> Judged:
    """The first line must match but for its white space and its case. Unusable: empty."""

    def same(text: str, true: str) -> bool:
        return "".join(text.casefold().split()) == "".join(true.casefold().split())

    return _first_lines(examples, answers, same, bool)


def texts(examples: Sequence[Example], answers: Sequence[Generated]) -> Judged:
    """Explanations: besides exact matches, the mean F1 over the words that the two texts share. Unusable: empty."""
    rows = exact(examples, answers).rows
    return _open((row.changed(usable=row.predicted != "") for row in rows), explanations=True)


def parts(text: str) -> list[str]:
    """The answers in a text that holds several: separated by commas or line breaks, without outer white space."""
    return [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]


def _first_lines(
    examples: Sequence[Example],
    answers: Sequence[Generated],
    same: Callable[[str, str], bool],
    usable: Callable[[str], bool],
) -> Judged:
    def judged(index: int, example: Example, answer: Generated) -> Prediction:
        line = _first_line(answer.text)
        return prediction(index, example, answer.text, same(line, str(example.answer)), usable=usable(line))

    return _open(judged(index, *pair) for index, pair in enumerate(zip(examples, answers, strict=True)))


def _open(predictions: Iterable[Prediction], *, explanations: bool = False) -> Judged:
    rows = list(predictions)
    outcomes = Outcomes(
        truth=[row.answer for row in rows],
        predicted=[row.predicted for row in rows],
        correct=[row.correct for row in rows],
        usable=[row.usable for row in rows],
        explanations=explanations,
    )
    return Judged("generation", outcomes, rows)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _number(text: str) -> Decimal | None:
    found = _NUMBER.search(text)
    return Decimal(re.sub(r"[$,]", "", found[0])) if found else None
