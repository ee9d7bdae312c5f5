"""What a study says of the time that is left."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from trimtab.cli.displays import study


def test_time_left_is_told_by_the_cells_of_a_kind_that_came_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 20.0, 20.0, 30.0, 30.0, 31.0, 91.0, 91.0])  # at the beginning of each cell, and at its end
    monkeypatch.setattr(study, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(study, "told", lambda cell, result: "done")
    text = io.StringIO()
    display = study.StudyDisplay(Console(file=text, width=100))
    search, run = cell_named("dora, search at rate 0.1", searching=True), cell_named("dora, seed 0")
    display.planned(searches=2, runs=4)
    for number, kind in enumerate((search, search, run, run, run), 1):
        cell = SimpleNamespace(**vars(kind), config=SimpleNamespace(output=Path(str(number))))
        display.cell_began(cell, number, 6)
        if number == 3:
            display.cell_failed(cell, "no memory")
        elif number < 5:
            display.cell_ended(cell, {})
    assert [line.strip() for line in text.getvalue().splitlines()] == [
        "[1/6] dora, search at rate 0.1",
        "[1/6] dora, search at rate 0.1: done",
        "[2/6] dora, search at rate 0.1, about 20.0 s left of the search",
        "[2/6] dora, search at rate 0.1: done",
        "[3/6] dora, seed 0",
        "[3/6] dora, seed 0: failed: no memory",
        "[4/6] dora, seed 0",
        "[4/6] dora, seed 0: done",
        "[5/6] dora, seed 0, about 2 min 00 s left",
    ]


def test_what_several_runs_remark_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    display = study.StudyDisplay(Console(file=io.StringIO(), width=100))
    for text in ("rows are short", "rows are short", "the rate is low", "rows are short"):
        display.remark(text)
    assert capsys.readouterr().err.split("note: ")[1:] == ["rows are short\n  ", "the rate is low\n"]


def cell_named(name: str, searching: bool = False) -> Any:
    return SimpleNamespace(name=name, searching=searching)
