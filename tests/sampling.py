"""How much of the suite is run: the sample of ``make test``, or all of it with ``pytest --all`` (``make test-all``).

A sample is chosen in the file of its tests, so that a case that is left out is no test that is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
everything = False
"""Whether ``--all`` was said; conftest.py writes it here before it reads a test."""


def sample(cases: Sequence[T], every: int, always: Sequence[T] = ()) -> list[T]:
    """Each ``every``-th of ``cases``, and those that are always run; with ``--all``, all of them."""
    return [case for place, case in enumerate(cases) if everything or place % every == 0 or case in always]
