"""The closed set that the answers of some rows come from: found in the rows, or named and checked against them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from trimtab.data.rows import Example
from trimtab.errors import DataError

MOST_CHOICES, MOST_WORDS, FEWEST_REPEATS = 20, 5, 5


def infer_choices(examples: Sequence[Example]) -> list[str] | None:
    """The closed set that the answers come from, sorted; None if it does not look like one.

    It does with 2 to 20 different answers of at most five words each, repeated five times on average.
    """
    answers = [example.answer for example in examples]
    found = {answer for answer in answers if answer is not None}
    closed = (
        None not in answers
        and 2 <= len(found) <= MOST_CHOICES
        and all(len(answer.split()) <= MOST_WORDS for answer in found)
        and len(answers) >= FEWEST_REPEATS * len(found)
    )
    return sorted(found) if closed else None


def check_choices(choices: Sequence[str], examples: Sequence[Example]) -> list[str]:
    """The choices without outer white space.

    Raises:
        DataError: fewer than two choices, one that is empty or named twice, or a row whose answer is not among them.
    """
    clean = [choice.strip() for choice in choices]
    if len(clean) < 2 or "" in clean:
        raise DataError(f"choices: expected at least two answers, none of them empty, but got {list(choices)}.")
    twice = [choice for choice, count in Counter(clean).items() if count > 1]
    if twice:
        raise DataError(f"choices: '{twice[0]}' is named {clean.count(twice[0])} times; name each answer once.")
    for example in examples:
        if example.answer not in clean:
            what = "has no answer" if example.answer is None else f"has the answer '{example.answer}'"
            raise DataError(
                f"{example.source}, row {example.number}: {what}, which is not among the choices "
                f"({', '.join(clean)}); add it to the choices, or repair the row (upper and lower case differ)."
            )
    return clean


def closed_set(named: Sequence[str] | Literal["infer"] | None, examples: Sequence[Example]) -> list[str] | None:
    """The closed set that ``examples`` are answered from: the one that is ``named``, or with ``infer`` the one that is
    found in them; None where there is none, or where ``infer`` finds that each row brings its own choices.

    Raises DataError as `check_choices` does.
    """
    if named != "infer":
        return None if named is None else check_choices(named, examples)
    return None if all(example.choices for example in examples) else infer_choices(examples)
