"""The closing tables of the terminal."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from trimtab.errors import RunError
from trimtab.reports.run.run_tables import answers_table, plan_table, results_table
from trimtab.runs.read import read_run
from trimtab.runs.records import PlanRecord


def lines(table: Table, width: int = 160) -> list[list[str]]:
    """The rows of a printed table, as the words of each."""
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(table)
    assert isinstance(console.file, StringIO)
    printed = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in printed)
    return [line.split() for line in printed if line.strip()]


def test_results(run: Path) -> None:
    rows = lines(results_table(read_run(run)))
    assert ["kind", "accuracy", "6", "33.3", "%", "66.7", "%", "+33.3", "50.0", "%", "(always", "no)"] in rows
    assert ["macro", "F1", "25.0", "%", "62.5", "%", "+37.5"] in rows


def test_results_of_open_answers_and_text(open_run: Path) -> None:
    rows = lines(results_table(read_run(open_run)))
    assert ["tales", "perplexity", "3", "20.00", "15.00", "−25.0", "%"] in rows
    assert ["test", "exact", "match", "4", "0.0", "%", "50.0", "%", "+50.0"] in rows
    assert ["unusable", "50.0", "%", "25.0", "%", "−25.0"] in rows
    assert ["perplexity", "8.000", "6.000", "−25.0", "%"] in rows


def test_results_of_choices_of_their_own(exam_run: Path) -> None:
    rows = lines(results_table(read_run(exam_run)))
    assert ["exam", "accuracy", "4", "25.0", "%", "75.0", "%", "+50.0", "25.0", "%", "(chance)"] in rows
    assert ["accuracy", "per", "character", "50.0", "%", "100.0", "%", "+50.0"] in rows


def test_answers(run: Path) -> None:
    rows = lines(answers_table(read_run(run), 4))
    assert rows[0] == ["row", "prompt", "true", "answer", "before", "after"]
    assert len(rows) == 2 + 4
    assert ["4", "It", "has", "an", "ending", "no", "✓", "no", "✗", "yes"] in rows
    assert any(row[-4:] == ["✗", "no", "✓", "yes"] for row in rows)


def test_answers_without_before(run: Path) -> None:
    (run / "predictions" / "kind.before.jsonl").unlink()
    rows = lines(answers_table(read_run(run)))
    assert rows[0] == ["row", "prompt", "true", "answer", "after"]
    assert len(rows) == 2 + 5


def test_answers_of_several_test_sets_share_the_rows(run: Path) -> None:
    for stage in ("before", "after"):
        text = (run / "predictions" / f"kind.{stage}.jsonl").read_text()
        (run / "predictions" / f"other.{stage}.jsonl").write_text(text)
    rows = lines(answers_table(read_run(run), 5))
    assert [row[0] for row in rows[2:]] == ["kind"] * 3 + ["other"] * 2


def test_text_from_data_is_no_markup(run: Path) -> None:
    file = run / "predictions" / "kind.after.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row |= {"predicted": "[red]x[/]", "prompt": f"{row['row']} \x1b[2J[bold] {row['row']}", "correct": False}
    file.write_text("\n".join(json.dumps(row) for row in rows))
    printed = " ".join(" ".join(row) for row in lines(answers_table(read_run(run))))
    assert "[red]x[/]" in printed
    assert r"\x1b[2J[bold]" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("width", [80, 160])
def test_plan(run: Path, width: int) -> None:
    rows = lines(plan_table(PlanRecord.read(json.loads((run / "plan.json").read_text()))), width)
    assert rows[0] == ["rule", "method", "match", "layers", "options", "modules", "parameters", "percent"]
    first = next(row for row in rows if row[:2] == ["1", "dora"])
    assert first[2:4] == ["all-linear", "all"]
    assert first[-4:] == ["2", "600", "3.00", "%"]
    assert rows[-1] == ["in", "all", "3", "700", "3.50", "%"]
    assert any("outer:1" in row and row[-4:] == ["1", "100", "0.50", "%"] for row in rows)


def test_damage_is_told(run: Path) -> None:
    (run / "evaluation" / "kind.after.json").write_text("{")
    with pytest.raises(RunError, match=r"kind\.after\.json is damaged"):
        results_table(read_run(run))
