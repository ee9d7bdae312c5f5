"""What ``make test`` takes, held by numbers that are no clocks. Whoever comes to a bound makes room first: a smaller
product (``sampling``, ``pairwise``), one run for several tests, a fork or this process in place of an interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

import sampling

TESTS = Path(__file__).parent
CASES = 40_000 if sampling.everything else 9_200
INTERPRETERS = 32
"""Places where a test starts a Python of its own, which takes seconds to import what this process has."""


def test_the_cases_are_not_many_more_than_they_were(request: pytest.FixtureRequest) -> None:
    assert len(request.session.items) <= CASES


def test_few_tests_start_an_interpreter() -> None:
    found = {
        str(file.relative_to(TESTS)): file.read_text("utf-8").count("sys.executable, ") for file in TESTS.rglob("*.py")
    }
    found.pop("test_suite.py")
    assert sum(found.values()) <= INTERPRETERS, {name: count for name, count in found.items() if count}
