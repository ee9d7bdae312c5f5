"""Closed sets of answers: inferred from the rows, or named by the user and checked against the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from trimtab.data.rows import Answered, Example
from trimtab.errors import DataError

MOST_CHOICES, MOST_WORDS, FEWEST_REPEATS = 20, 5, 5


def infer_choices(examples: Sequence[Example]) -> list[str] | None:
    """The different answers of the rows, sorted, if they look like a closed set; else None.

    A closed set has 2 to 20 different answers of at most five words each, each repeated five times on average.
    """
    choices = {example.answer for example in examples if example.answer is not None}
    closed = (
        all(example.answer is not None for example in examples)
        and 2 <= len(choices) <= MOST_CHOICES
        and all(len(choice.split()) <= MOST_WORDS for choice in choices)
        and len(examples) >= FEWEST_REPEATS * len(choices)
    )
    return sorted(choices) if closed else None


def check_choices(choices: Sequence[str], examples: Sequence[Answered]) -> list[str]:
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
                f"{example.place}: {what}, which is not among the choices ({', '.join(clean)}); add it to the "
                "choices, or repair the row (upper and lower case differ)."
            )
    return clean


def closed_set(named: Sequence[str] | Literal["infer"] | None, examples: Sequence[Example]) -> list[str] | None:
    """The closed set that is ``named``, or with ``infer`` the one that the rows' answers form; None if there is none.

    Rows that all bring choices of their own have none in common. Raises DataError as `check_choices` does.
    """
    if named != "infer":
        return None if named is None else check_choices(named, examples)
    return None if all(example.choices for example in examples) else infer_choices(examples)
