"""The programs below ``studies/`` are no package: their modules are found by their folders."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

STUDIES = Path(__file__).resolve().parents[3] / "studies"
sys.path[:0] = [str(STUDIES / name) for name in ("memorize", "pattern", "rates")]


@pytest.fixture
def program() -> Callable[[str], Callable[[Sequence[str]], int]]:
    """The ``main`` of the program that a study's folder holds."""

    def load(name: str) -> Callable[[Sequence[str]], int]:
        main: Callable[[Sequence[str]], int] = runpy.run_path(str(STUDIES / name / "run.py"))["main"]
        return main

    return load
