"""What a study says of the time that is left."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from trimtab.cli import comparing


def test_a_run_that_failed_is_no_measure_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 61.0, 61.0])  # at the beginning of each run, and at the end of one
    monkeypatch.setattr(comparing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(comparing, "told", lambda cell, result: "done")
    text = io.StringIO()
    display, cell = comparing.StudyDisplay(Console(file=text, width=100)), cell_named("dora, seed 0")
    display.cell_began(cell, 1, 4)
    display.cell_failed(cell, "no memory")
    display.cell_began(cell, 2, 4)
    display.cell_ended(cell, {})
    display.cell_began(cell, 3, 4)
    assert [line.strip() for line in text.getvalue().splitlines()] == [
        "[1/4] dora, seed 0",
        "[1/4] dora, seed 0: failed: no memory",
        "[2/4] dora, seed 0",
        "[2/4] dora, seed 0: done",
        "[3/4] dora, seed 0, about 2 min 00 s left",
    ]


def cell_named(name: str) -> Any:
    return SimpleNamespace(name=name)
