"""Multiple-choice rows: a question, the choices of this row, and which of them is right.

Two layouts are read. On the hub, rows have ``question``, ``choices`` and ``answer`` or ``answerKey``, where the choices
are a list of texts, or ``{"text": [...], "label": [...]}`` as in ARC. In LLM-Adapters' commonsense sets (arXiv
2304.01933) the ``instruction`` contains the choices ("Answer1: ... Answer2: ...", or "with true or false" in BoolQ) and
``answer`` names one ("answer2", "true"). These rows have the keys of ``alpaca``, so the configuration has to name this
form.

The model reads the question alone and learns to write the text of the right choice; in evaluation the text of each
choice is scored. Small models do far better at this than at naming the right choice by its label.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from trimtab.data.forms import _form
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Example, Row
from trimtab.errors import DataError

PROMPT = "Question: {question}\nAnswer:"
"""The prompt with which such sets are commonly evaluated."""

LETTERS = tuple(string.ascii_uppercase)
"""By which rows name their choices where no choice is such a letter itself."""

_INSTRUCTION = re.compile(
    r"(?s)Please choose the correct \w+ [^:]*: (?P<question>.*?)\n\n(?P<choices>(?P<word>[A-Z][a-z]+)1: .*?)"
    r"\s+Answer format: .*"
)
_TRUE_OR_FALSE = re.compile(
    r"(?s)Please answer the following question with (?P<one>\w+) or (?P<other>\w+), question: (?P<question>.*?)"
    r"\s+Answer format: .*"
)


class MultipleChoice(_form.Form):
    """A question, the choices, and which of them is right."""

    keys = ("question", "choices")
    optional = ("answer", "answerKey")
    precedence = 5

    def example(self, row: Row, reading: Reading) -> Example | None:
        try:
            asked = read_question(row.value)
        except ValueError as error:
            raise DataError(f"{row.place}: {error} (keys found: {_form.keys_of(row)}).") from None
        for text in (asked.question, *asked.choices):
            _form.require_encodable(text, row.place)
        pair = _form.pair(row, PROMPT.format(question=asked.question), f" {asked.answer}", reading)
        return replace(pair, choices=asked.choices)


class Question(NamedTuple):
    """One row."""

    question: str
    choices: tuple[str, ...]
    """At least two, without duplicates."""
    answer: str
    """The right choice."""


def read_question(row: Mapping[str, Any]) -> Question:
    """The question in ``row``. Raises ValueError, which says what is wrong, if the row has neither layout."""
    if "question" not in row and "instruction" in row:
        return _from_instruction(row)
    choices: Any = row.get("choices")
    labels: Any = None
    if isinstance(choices, Mapping):
        labels, choices = choices.get("label"), choices.get("text")
        if not isinstance(labels, list) or not isinstance(choices, list) or len(labels) != len(choices):
            raise ValueError("'choices' must hold as many 'label' as 'text'")
    if not isinstance(choices, list):
        raise ValueError(f"'choices' must be a list of texts, but is {type(choices).__name__}")
    key = "answer" if row.get("answer") is not None else "answerKey"
    return _question(row.get("question"), choices, labels, row.get(key), key)


def _from_instruction(row: Mapping[str, Any]) -> Question:
    instruction, answer = row.get("instruction"), row.get("answer")
    text = instruction if isinstance(instruction, str) else ""
    if (either := _TRUE_OR_FALSE.fullmatch(text)) is not None:
        return _question(either["question"], [either["one"], either["other"]], None, answer, "answer")
    match = _INSTRUCTION.fullmatch(text)
    if match is None:
        raise ValueError(
            "its 'instruction' is not of the form 'Please choose the correct answer to the question: ... Answer1: ... "
            "Answer2: ... Answer format: ...'"
        )
    _, *parts = re.split(rf"(?:^|\s+){match['word']}(\d+): ?", match["choices"])
    labels = [match["word"].lower() + number for number in parts[::2]]
    return _question(match["question"], parts[1::2], labels, answer, "answer")


def _question(question: Any, choices: list[Any], labels: list[Any] | None, answer: Any, key: str) -> Question:
    if not isinstance(question, str) or not question.strip():
        raise ValueError("'question' must be a text that is not empty")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("each of its choices must be a text that is not empty")
    texts = [choice.strip() for choice in choices]
    known: list[Any] = labels if labels is not None else texts
    if isinstance(answer, str) and answer.strip() in known:
        right = known.index(answer.strip())
    elif labels is None and isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        right = answer
    elif labels is None and isinstance(answer, str) and answer in LETTERS[: len(texts)]:
        right = LETTERS.index(answer)
    else:
        others = "" if labels is not None else f", or a number from 0 to {len(texts) - 1}, or a letter"
        raise ValueError(f"'{key}' must be one of {', '.join(map(str, known))}{others}, but is {answer!r}")
    different = tuple(dict.fromkeys(texts))
    if len(different) < 2:
        raise ValueError(f"it needs at least two different choices, but has {len(different)}")
    return Question(question.strip(), different, texts[right])
