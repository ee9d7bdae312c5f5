"""What a model wrote, read and judged: which label is it, which number, and is it the right one?

A label counts where it stands as words of their own, in any case, in the first line that is not empty: a model that
finds no end goes on with something else. A text that names no label, or two, is unusable. That is a wrong answer, and
it is counted apart; it never becomes a class, so F1 is over the true labels alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from trimtab.data.rows import Example
from trimtab.evaluation.generation import Generated, same_answer
from trimtab.evaluation.metrics import choice_metrics

Outcome = tuple[dict[str, Any], list[dict[str, Any]]]
"""A result without what all results have, and its predictions, one a row."""

Judge = Callable[[Sequence[Example], Sequence[Generated]], Outcome]
"""Makes an outcome of rows and of what was written to each."""

_NUMBER = re.compile(r"[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def prediction(index: int, example: Example, predicted: str, correct: bool) -> dict[str, Any]:
    """What every prediction says of its row."""
    return {
        "row": index + 1,
        "prompt": example.prompt,
        "answer": example.answer,
        "predicted": predicted,
        "correct": correct,
    }


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


def exact(examples: Sequence[Example], answers: Sequence[Generated]) -> Outcome:
    """Open answers: the whole text must match. Unusable: empty, or without an end."""
    rows = [
        {
            **prediction(index, example, answer.text, same_answer(answer.text, str(example.answer))),
            "usable": answer.usable,
        }
        for index, (example, answer) in enumerate(zip(examples, answers, strict=True))
    ]
    return _open(rows), rows


def labels(
    examples: Sequence[Example], answers: Sequence[Generated], *, known: Sequence[str], several: bool = False
) -> Outcome:
    """Labels of a closed set ``known``, one a row, or ``several``, separated by commas (or line by line).

    Of several, answer by answer is counted: what is missing is unusable, what is too much is not looked at.
    """
    read = label_reader(known)
    truth: list[str] = []
    found: list[str | None] = []
    rows = []
    for index, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        true = parts(str(example.answer)) if several else [str(example.answer)]
        said = [read(part) for part in (parts(answer.text) if several else [answer.text])][: len(true)]
        said += [None] * (len(true) - len(said))
        row = prediction(index, example, answer.text, said == true)
        rows.append({**row, "usable": None not in said, "read": said if several else said[0]})
        truth += true
        found += said
    result = {
        "kind": "choice",
        **({"answers": len(truth)} if several else {}),
        "choices": list(known),
        **choice_metrics(truth, [label or "" for label in found], known),
        "unusable": found.count(None) / len(found),
    }
    return result, rows


def numbers(examples: Sequence[Example], answers: Sequence[Generated]) -> Outcome:
    """The first number of the first line must have the value of the true one; signs of currency and commas do not
    count. Unusable: no number."""

    def same(text: str, true: str) -> bool:
        wanted = _number(true)
        return same_answer(text, true) if wanted is None else _number(text) == wanted

    return _first_lines(examples, answers, same, lambda text: _number(text) is not None)


def formulas(examples: Sequence[Example], answers: Sequence[Generated]) -> Outcome:
    """The first line must match but for its white space and its case. Unusable: empty."""

    def same(text: str, true: str) -> bool:
        return "".join(text.casefold().split()) == "".join(true.casefold().split())

    return _first_lines(examples, answers, same, bool)


def texts(examples: Sequence[Example], answers: Sequence[Generated]) -> Outcome:
    """Explanations: besides exact matches, the mean F1 over the words that the two texts share. Unusable: empty."""
    result, rows = exact(examples, answers)
    rows = [{**row, "usable": row["predicted"] != ""} for row in rows]
    shares = [word_f1(row["predicted"], row["answer"]) for row in rows]
    return {**result, **_open(rows), "word_f1": sum(shares) / len(shares)}, rows


def word_f1(one: str, other: str) -> float:
    """F1 of the words in common, counted as often as they stand in both; case and punctuation do not count."""
    first, second = (Counter(re.findall(r"\w+", text.casefold())) for text in (one, other))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def parts(text: str) -> list[str]:
    """The answers in a text that holds several: separated by commas or line breaks, without outer white space."""
    return [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]


def _first_lines(
    examples: Sequence[Example],
    answers: Sequence[Generated],
    same: Callable[[str, str], bool],
    usable: Callable[[str], bool],
) -> Outcome:
    rows = []
    for index, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        line = _first_line(answer.text)
        row = prediction(index, example, answer.text, same(line, str(example.answer)))
        rows.append({**row, "usable": usable(line)})
    return _open(rows), rows


def _open(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kind": "generation",
        "exact_match": sum(row["correct"] for row in rows) / len(rows),
        "unusable": sum(not row["usable"] for row in rows) / len(rows),
    }


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _number(text: str) -> Decimal | None:
    found = _NUMBER.search(text)
    return Decimal(re.sub(r"[$,]", "", found[0])) if found else None
