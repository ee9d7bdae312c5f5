"""Reading files: what comes out, where each row says it stands, and what the errors say."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data.sources import Row, read_rows
from trimtab.errors import DataError

ROWS = [{"prompt": "1 + 1 =", "completion": "2"}, {"prompt": 'say "hi",\nthen go', "completion": "None"}]


def read(source: str, root: Path) -> list[Row]:
    return list(read_rows(source, root=root))


def error_of(source: str, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(source, root)
    return str(caught.value)


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_all(folder: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.ndjson").write_text(lines)
    (folder / "list.json").write_text(json.dumps(ROWS, indent=2))
    (folder / "held.json").write_text(json.dumps({"version": 1, "tags": ["x"], "data": ROWS}))
    (folder / "lines.json").write_text(lines)
    write_csv(folder / "a.csv", ",")
    write_csv(folder / "a.tsv", "\t")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "list.json", "held.json", "lines.json", "a.csv", "a.tsv", "a.parquet"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write_all(tmp_path)
    rows = read(name, tmp_path)
    assert [row.value for row in rows] == ROWS
    assert [(row.source, row.number) for row in rows] == [(name, 1), (name, 2)]


@pytest.mark.parametrize(
    ("name", "separator", "said"),
    [
        ("a.csv", ";", "separated by a semicolon (prompt;completion), and not as its ending says; save it with commas"),
        ("a.csv", "\t", "separated by a tab (prompt\tcompletion), and not as its ending says; name the file .tsv"),
        ("a.tsv", ",", "separated by a comma (prompt,completion), and not as its ending says; name the file .csv"),
    ],
)
def test_another_separator_is_named(tmp_path: Path, name: str, separator: str, said: str) -> None:
    write_csv(tmp_path / name, separator)
    assert said in error_of(name, tmp_path)


def test_relative_paths_start_from_root_and_absolute_ones_do_not(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "configs" / "data").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "configs" / "data" / "a.jsonl").write_text('{"text": "here"}')
    assert read("data/a.jsonl", tmp_path / "configs")[0].value == {"text": "here"}
    assert read(str(tmp_path / "configs" / "data" / "a.jsonl"), elsewhere)[0].value == {"text": "here"}


def test_jsonl_numbers_are_lines_and_blank_lines_count(tmp_path: Path) -> None:
    # U+2028 is a line break to str.splitlines, but not to JSON lines.
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\xe2\x80\xa8c"}\r\n   \n{"text": "d"}'
    )
    rows = read("a.jsonl", tmp_path)
    assert [(row.number, row.place, row.value["text"]) for row in rows] == [
        (1, "a.jsonl, line 1", "a"),
        (3, "a.jsonl, line 3", "b\u2028c"),
        (5, "a.jsonl, line 5", "d"),
    ]


def test_csv_place_has_row_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"one\ntwo"\nthree\n')
    rows = read("a.csv", tmp_path)
    assert [(row.number, row.place) for row in rows] == [(1, "a.csv, row 1 (line 3)"), (2, "a.csv, row 2 (line 4)")]


def test_csv_keeps_long_fields_and_the_limit_of_others(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * (before + 1))
    assert len(read("a.csv", tmp_path)[0].value["text"]) == before + 1
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["a.jsonl, line 2", "one JSON object", "column", '{"text": "b"']),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', ["a.jsonl, line 2", "came a list", "name it .json"]),
        ("a.jsonl", b'"text"', ["a.jsonl, line 1", "came a string"]),
        ("a.jsonl", b"null", ["a.jsonl, line 1", "came null"]),
        ("a.jsonl", b"12", ["a.jsonl, line 1", "came a number"]),
        ("a.jsonl", b'{\n  "text": "a"\n}', ["a.jsonl, line 1", "name it .json"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', ["a.jsonl, line 2", "UTF-8", "0xe9"]),
        ("a.jsonl", "{}".encode("utf-16"), ["a.jsonl, line 1", "UTF-8", "0xff"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl, line 1", "nested too deeply"]),
        ("a.jsonl", b" \n\n", ["a.jsonl", "no rows"]),
        ("a.json", b'[{"text": "a"},\n {"text": }]', ["a.json, line 2", "expected JSON", "column 11"]),
        ("a.json", b'[{"text": "a"}, 3]', ["a.json, row 2", "JSON object", "a number"]),
        ("a.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', ["a.json", "train, test"]),
        ("a.json", b'{"text": "a"}', ["a.json", "none"]),
        ("a.json", b"true", ["a.json", "came true"]),
        ("a.json", b"[]", ["a.json", "no rows"]),
        ("a.json", b"[\n\n\xff]", ["a.json, line 3", "UTF-8", "0xff"]),
        ("a.csv", b"prompt,completion\na,b\nc\n", ["a.csv, row 2 (line 3)", "expected 2 fields", "came 1"]),
        ("a.csv", b"prompt,completion\na,b,c\n", ["a.csv, row 1 (line 2)", "came 3", "quotes"]),
        ("a.csv", b'prompt,completion\na,"b\n', ["a.csv, line 2", "bad CSV"]),
        ("a.csv", b"text,text\na,b\n", ["a.csv", "twice: text"]),
        ("a.csv", b"prompt,completion\n", ["a.csv", "no rows"]),
        ("a.csv", b"", ["a.csv", "no rows"]),
        ("a.parquet", b"PAR1 this is not a table PAR1", ["a.parquet", "not a readable parquet file"]),
        ("a.parquet", b"", ["a.parquet", "not a readable parquet file"]),
        ("a.xlsx", b"PK", ["a.xlsx", "'.xlsx'", ".jsonl"]),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, said: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    message = error_of(name, tmp_path)
    for part in said:
        assert part in message


def test_rows_before_a_bad_line_are_not_lost_track_of(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 4000 + "{'text': 'b'}\n")
    assert "a.jsonl, line 4001" in error_of("a.jsonl", tmp_path)


def test_missing_file_names_near_misses_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "test.jsonl", "notes.txt"):
        (tmp_path / "data" / name).write_text("{}")
    message = error_of("data/trian.jsonl", tmp_path)
    assert "data/trian.jsonl" in message
    assert "Did you mean train.jsonl" in message
    # Without its suffix it could be a hub id; the folder `data` says that it is a path.
    assert "Did you mean train.jsonl" in error_of("data/train", tmp_path)
    assert "test.jsonl, train.jsonl" in error_of("data/zzz.csv", tmp_path)
    assert "does not exist" in error_of("nowhere/train.jsonl", tmp_path)
    assert "train.jsonl" in error_of("data", tmp_path)


def test_an_empty_name_is_refused(tmp_path: Path) -> None:
    assert "empty" in error_of(" ", tmp_path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name/en.small", ("owner/name", "en.small", "train")),
        ("owner/name/en:train[:10%]", ("owner/name", "en", "train[:10%]")),
    ],
)
def test_hub_id(tmp_path: Path, monkeypatch: Any, source: str, expected: tuple[str, str | None, str]) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read(source, tmp_path)
    assert asked == [expected]
    assert [row.value for row in rows] == ROWS
    assert (rows[1].source, rows[1].number, rows[1].place) == (source, 2, f"{source}, row 2")


def test_hub_errors_say_what_happened(tmp_path: Path, monkeypatch: Any) -> None:
    import datasets

    for raised, said in [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub"), "cannot be reached"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist"), "no dataset 'owner/name'"),
        (ValueError('Unknown split "tset". Should be one of [train]'), "Should be one of [train]"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported"),
    ]:

        def load(*args: Any, error: Exception = raised, **options: Any) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        message = error_of("owner/name", tmp_path)
        assert message.startswith("owner/name: ")
        assert said in message


def test_hub_out_of_reach_for_real(tmp_path: Path, monkeypatch: Any) -> None:
    """What `datasets` itself raises without a network is what is caught."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert "cannot be reached" in error_of("owner-that-is-not/name-that-is-not", tmp_path)


def test_no_network_for_files(tmp_path: Path, monkeypatch: Any) -> None:
    import socket

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_all(tmp_path)
    for name in ("a.jsonl", "list.json", "a.csv", "a.parquet"):
        assert len(read(name, tmp_path)) == 2
    assert "There is no data file" in error_of("owner/name.jsonl", tmp_path)
