"""What is told once for each kind."""

from __future__ import annotations

import pytest

from trimtab.notes import Notes


def test_rows_of_one_kind_become_one_sentence_with_their_number_and_the_first_place() -> None:
    notes = Notes()
    notes.row("tides.jsonl, line 2", "keys that are not used (port)", "Name them in data.columns")
    notes.add("the table has no header")
    for line in (5, 9):
        notes.row(f"tides.jsonl, line {line}", "keys that are not used (port)", "Name them in data.columns")
    notes.row("tides.jsonl, line 9", "an end that stands in the row already")
    assert list(notes) == [
        "keys that are not used (port): 3 rows, the first in tides.jsonl, line 2. Name them in data.columns",
        "the table has no header",
        "an end that stands in the row already: 1 row in tides.jsonl, line 9",
    ]


def test_the_same_sentence_is_kept_once() -> None:
    notes = Notes()
    notes.add("the run has 3 steps")
    notes.add("the run has 3 steps")
    assert list(notes) == ["the run has 3 steps"]


def test_what_was_noticed_before_an_error_is_told_all_the_same() -> None:
    notes, heard = Notes(), list[str]()

    def read() -> None:
        with notes.told(heard.append):
            notes.add("the third column is empty")
            raise ValueError("row 4")

    with pytest.raises(ValueError, match="row 4"):
        read()
    assert heard == ["the third column is empty"]
