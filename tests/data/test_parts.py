"""Sources that are more than one plain file: patterns, parts, compressed files, texts, saved datasets, columns."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data.forms import read_examples
from trimtab.data.rows import Source
from trimtab.data.sources import is_local, name_of, read_rows, rows_of
from trimtab.errors import DataError
from trimtab.notes import Notes


def write(path: Path, first: int, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(first, first + count)))
    return path


def numbers(source: str, root: Path) -> list[int]:
    return [int(row.value["text"].split()[1]) for row in read_rows(source, root=root)]


def error_of(source: str | Source, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(rows_of(Source(path=source) if isinstance(source, str) else source, root=root))
    return str(caught.value)


def zstd(raw: bytes) -> bytes:
    compressed: bytes = pa.Codec("zstd").compress(raw, asbytes=True)
    return compressed


@pytest.mark.parametrize(
    ("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
)
def test_text_files_may_be_compressed(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    lines = [json.dumps({"text": f"line {number}"}).encode() + b"\n" for number in range(400)]
    # Two pieces one after the other, as tools that compress in parallel write them.
    (tmp_path / f"a.jsonl.{ending}").write_bytes(pack(b"".join(lines[:250])) + pack(b"".join(lines[250:])))
    (tmp_path / f"a.csv.{ending}").write_bytes(pack(b"text\nline 7\n"))
    assert numbers(f"a.jsonl.{ending}", tmp_path) == list(range(400))
    assert numbers(f"a.csv.{ending}", tmp_path) == [7]
    whole = (tmp_path / f"a.jsonl.{ending}").read_bytes()
    (tmp_path / f"cut.jsonl.{ending}").write_bytes(whole[:-9])
    (tmp_path / f"other.jsonl.{ending}").write_bytes(b"".join(lines))
    for name in ("cut", "other"):
        assert f"{name}.jsonl.{ending} cannot be unpacked" in error_of(f"{name}.jsonl.{ending}", tmp_path)


def test_a_line_of_a_txt_file_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff  one two \r\n\r\n \t\nthree\u2028four".encode())
    rows = list(read_rows("a.txt", root=tmp_path))
    assert [(row.number, row.value) for row in rows] == [(1, {"text": "  one two "}), (4, {"text": "three\u2028four"})]
    assert [row.form for row in read_examples("a.txt", None, root=tmp_path)] == ["text", "text"]


def test_a_pattern_names_files_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d" / "b.jsonl", 10, 2)
    write(tmp_path / "d" / "a.jsonl", 0, 2)
    write(tmp_path / "d" / "deep" / "c.jsonl", 20, 1)
    write(tmp_path / "d" / ".hidden.jsonl", 30, 1)
    assert numbers("d/*.jsonl", tmp_path) == [0, 1, 10, 11]
    assert numbers("d/**/*.jsonl", tmp_path) == [0, 1, 10, 11, 20]
    assert numbers("d/[b]*.jsonl", tmp_path) == [10, 11]
    assert [row.source for row in read_rows("d/*.jsonl", root=tmp_path)][::2] == ["d/a.jsonl", "d/b.jsonl"]
    assert next(read_rows(str(tmp_path / "d" / "*.jsonl"), root=tmp_path)).source == str(tmp_path / "d" / "a.jsonl")
    assert "no file has such a name" in error_of("d/*.csv", tmp_path)
    # A folder whose own name has brackets is that folder.
    write(tmp_path / "run [1]" / "x.jsonl", 40, 1)
    assert numbers("run [1]/*.jsonl", tmp_path) == numbers("run [1]/x.jsonl", tmp_path) == [40]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("[:3]", [0, 1, 2]),
        ("[17:]", [17, 18, 19]),
        ("[5:7]", [5, 6]),
        ("[-2:]", [18, 19]),
        ("[:-18]", [0, 1]),
        ("[:10%]", [0, 1]),
        ("[90%:]", [18, 19]),
        ("[45%:55%]", [9, 10]),
        ("[:1000]", list(range(20))),
    ],
)
def test_a_slice_takes_a_part(tmp_path: Path, part: str, expected: list[int]) -> None:
    write(tmp_path / "a.jsonl", 0, 20)
    assert numbers(f"a.jsonl{part}", tmp_path) == expected
    # Of a pattern the part is of all its files together.
    write(tmp_path / "d" / "a.jsonl", 0, 8)
    write(tmp_path / "d" / "b.jsonl", 8, 12)
    assert numbers(f"d/*.jsonl{part}", tmp_path) == expected


def test_slices_that_cannot_be_are_told_and_a_file_of_that_name_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 0, 5)
    assert error_of("a.jsonl[5:]", tmp_path) == "a.jsonl[5:] holds no rows."
    assert "[:500] or [10%:]" in error_of("a.jsonl[5]", tmp_path)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("not JSON\n")
    assert numbers("a.jsonl[:5]", tmp_path) == [0, 1, 2, 3, 4]  # nothing is read beyond the part
    (tmp_path / "odd[:2].csv").write_text("text\nline 1\nline 2\nline 3\n")
    assert numbers("odd[:2].csv", tmp_path) == [1, 2, 3]


def test_what_a_saved_dataset_holds_is_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = {"train": 5, "test": 2}
    held = {name: datasets.Dataset.from_dict({"text": [f"line {n}" for n in range(k)]}) for name, k in parts.items()}
    datasets.DatasetDict(held).save_to_disk(str(tmp_path / "both"))
    held["test"].save_to_disk(str(tmp_path / "one"))
    assert numbers("both", tmp_path) == [0, 1, 2, 3, 4]
    assert numbers("both:test", tmp_path) == [0, 1]
    assert numbers("both:train[:60%]", tmp_path) == [0, 1, 2]
    assert numbers("one", tmp_path) == [0, 1]
    assert "no split 'tset'; it has train, test. Did you mean 'test'?" in error_of("both:tset", tmp_path)
    # A copy of a dataset of the hub: files whose names say which split they are.
    write(tmp_path / "copy" / "data" / "train-00000.jsonl", 0, 4)
    write(tmp_path / "copy" / "data" / "test-00000.jsonl", 4, 2)
    assert numbers("copy:test", tmp_path) == [4, 5]
    assert "name a file in it" in error_of("copy", tmp_path)


@pytest.mark.parametrize(
    ("path", "local", "name"),
    [
        ("rows.jsonl.gz", True, "rows"),
        ("d/rows.v2.jsonl[:5]", True, "rows.v2"),
        ("d/*.jsonl", True, "rows"),
        ("d/test-*.csv", True, "test"),
        ("owner/name", False, "name"),
        ("owner/name:train[:1%]", False, "name-train"),
        ("owner/name.txt", True, "name"),
    ],
)
def test_what_is_local_and_what_it_is_called(tmp_path: Path, path: str, local: bool, name: str) -> None:
    assert (is_local(path, tmp_path), name_of(path)) == (local, name)


def test_columns_of_any_table_are_our_keys(tmp_path: Path) -> None:
    row = {"id": 3, "translation": {"en": "harbour", "fr": "port"}, "messages": "12", "a.b": "dotted"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    table = Source(path="t.jsonl", columns={"prompt": "translation.en", "completion": "translation.fr"})
    [example] = read_examples(table, None, root=tmp_path)
    assert (example.form, example.prompt, example.answer) == ("completion", "harbour", "port")
    notes = Notes()
    half = Source(path="t.jsonl", columns={"prompt": "id", "completion": "translation.fr"})
    read_examples(half, None, root=tmp_path, notes=notes)
    assert "'translation'" in "".join(notes)  # its English is left
    notes = Notes()
    read_examples(table, None, root=tmp_path, notes=notes)
    assert "'translation'" not in "".join(notes)
    assert next(rows_of(Source(path="t.jsonl", columns={"text": "a.b"}), root=tmp_path)).value == {
        "text": "dotted",
        "id": 3,
        "translation": row["translation"],
        "messages": "12",
    }
    with pytest.raises(DataError, match=r"t\.jsonl: data\.columns: no form has a key 'promt'.* Did you mean 'prompt'"):
        read_examples(Source(path="t.jsonl", columns={"promt": "id", "completion": "messages"}), None, root=tmp_path)
    message = error_of(Source(path="t.jsonl", columns={"prompt": "mesages"}), tmp_path)
    assert "t.jsonl, line 1: data.columns says that 'prompt' is in the column 'mesages', which is not there" in message
    assert "Did you mean 'messages'?" in message


def test_a_mapped_key_goes_before_what_else_the_table_holds(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,answer,instruction,output\nq,a,i,o\n")
    [example] = read_examples(
        Source(path="t.csv", columns={"prompt": "question", "completion": "answer"}), None, root=tmp_path
    )
    assert (example.form, example.answer) == ("completion", "a")


def test_a_parquet_column_of_categories_is_text(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([1, 0, None, 1], pa.int32()), pa.array(["no", "yes"]))
    pq.write_table(pa.table({"text": column, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert [row.value["text"] for row in read_rows("a.parquet", root=tmp_path)] == ["yes", "no", None, "yes"]
