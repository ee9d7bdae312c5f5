"""The files of published studies are what their records say, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trimtab.files import read_json, write_json
from trimtab.runs.study_records import SearchResults, StudyResults

STUDIES = Path(__file__).resolve().parents[2] / "studies"
PUBLISHED = sorted(file for name in ("results", "explore") for file in STUDIES.rglob(f"{name}.json"))


def record_of(file: Path) -> type[StudyResults | SearchResults]:
    return SearchResults if file.stem == "explore" else StudyResults


def test_there_are_published_files_of_both_kinds() -> None:
    assert {file.stem for file in PUBLISHED} == {"results", "explore"}


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: str(file.parent.relative_to(STUDIES)))
def test_a_published_file_is_read_and_written_back_to_the_byte(file: Path, tmp_path: Path) -> None:
    record = record_of(file)
    values = read_json(file)
    assert record(**values) == record.read(values)  # the strict way in names every key of it
    write_json(tmp_path / "again.json", record.read(values).plain())
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", ["results", "explore"])
def test_an_unknown_key_is_read_over_but_never_written(kind: str) -> None:
    file = next(file for file in PUBLISHED if file.stem == kind)
    record = record_of(file)
    values: dict[str, Any] = read_json(file)
    newer = json.loads(json.dumps(values))
    lines = newer["trials" if file.stem == "explore" else "summary"]
    for place in (newer, lines[0]):
        place["of_a_newer_version"] = 1
    assert record.read(newer) == record.read(values)
    with pytest.raises(ValidationError, match="of_a_newer_version"):
        record(**newer)
