"""Pairwise cover: a short list of rows in which every value of every factor meets every value of every other one.

Most faults need one setting, or two together, to show; the full product of nine factors has a hundred thousand rows,
and a pairwise cover of them some thirty. The same factors always give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
Factors = Mapping[str, Sequence[Any]]
Allowed = Callable[[Row], bool]
Pair = tuple[tuple[str, int], tuple[str, int]]


def pairs(factors: Factors, allowed: Allowed = lambda row: True) -> Iterator[Pair]:
    """Every two values of two factors, by name and place, that may stand together."""
    for one, other in combinations(factors, 2):
        for first, value in enumerate(factors[one]):
            for second, beside in enumerate(factors[other]):
                if allowed({one: value, other: beside}):
                    yield (one, first), (other, second)


def cover(factors: Factors, allowed: Allowed = lambda row: True) -> list[Row]:
    """Rows with a value for every factor that hold all ``pairs``, found greedily: a row begins with the first pair that
    is missing, and takes for each other factor the value that brings the most missing pairs.

    ``allowed`` is asked of parts of rows as well, and must allow each part of what it allows. A pair that stands in no
    allowed row is a KeyError: it is for ``allowed`` to say so.
    """
    missing = dict.fromkeys(pairs(factors, allowed))  # in order, unlike a set
    names = list(factors)
    rows = []
    while missing:
        begun = dict(next(iter(missing)))
        places = _complete(factors, allowed, missing, begun, [name for name in names if name not in begun])
        if places is None:
            raise KeyError(f"no row may hold { ({name: factors[name][place] for name, place in begun.items()}) }")
        for pair in combinations(((name, places[name]) for name in names), 2):
            missing.pop(pair, None)
        rows.append({name: factors[name][places[name]] for name in names})
    return rows


def _complete(
    factors: Factors, allowed: Allowed, missing: Mapping[Pair, None], places: dict[str, int], left: list[str]
) -> dict[str, int] | None:
    """A place in ``factors`` for each name that is left as well, or None where no allowed row begins like this."""
    if not left:
        return places
    order = list(factors)
    name, *later = left

    def brings(place: int) -> int:
        here = (name, place)
        return sum(
            ((here, there) if order.index(name) < order.index(there[0]) else (there, here)) in missing
            for there in places.items()
        )

    for place in sorted(range(len(factors[name])), key=brings, reverse=True):
        tried = {**places, name: place}
        if allowed({key: factors[key][value] for key, value in tried.items()}):
            whole = _complete(factors, allowed, missing, tried, later)
            if whole is not None:
                return whole
    return None
