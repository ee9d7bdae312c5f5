"""Hostile files of rows: each ends in a DataError of ours, or is read right, within bounds of time and memory.

All are read by one child, whose address space is limited and whose largest size is looked at afterwards.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data.sources import read_rows
from trimtab.errors import DataError

pytestmark = pytest.mark.timeout(300)

MIB = 2**20
CHILD = """
import json, resource, sys, time
from pathlib import Path
import pyarrow, pyarrow.parquet
from trimtab.data.sources import read_rows
from trimtab.errors import DataError
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
def most():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
began_at = most()
for name in sys.argv[2:]:
    began, count, said = time.process_time(), 0, ""
    try:
        for row in read_rows(name, root=Path(sys.argv[1])):
            count += 1
    except DataError as error:
        said = str(error)
    print(json.dumps([name, count, said, time.process_time() - began, most() - began_at]), flush=True)
"""


def zstd(raw: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(raw, asbytes=True)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


def one_value(value: str, rows: int) -> Any:
    """A column that holds ``value`` so often, which takes no memory here and hardly a byte in the file."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))


def write_all(folder: Path) -> dict[str, str]:
    """The name of each file, and what has to be in its error; an empty text where it is to be read."""
    made: dict[str, str] = {}

    def put(name: str, content: bytes, said: str) -> None:
        (folder / name).write_bytes(content)
        made[name] = said

    wide = ",".join(f"c{number}" for number in range(100_000)).encode()
    put("wide.csv", wide + b"\n" + b"1," * 99_999 + b"1\n", "")
    put("wide-short.csv", wide + b"\n1\n", "expected 100000 fields, as in the header (c0, c1, ")
    put("wide-twice.csv", wide + b"," + wide + b"\n1\n", "the header names a column twice: c0, c1, ")
    huge = b"a" * (100 * MIB)
    put("huge.jsonl", b'{"text": "' + huge + b'"}\n', "huge.jsonl, line 1: a row of more than 16 MiB")
    huge = huge[: 20 * MIB]
    put("huge.csv", b'text\n"' + huge + b'"\n', "line 2: a row of more than 16 MiB")
    put("huge-lines.csv", b'text\n"' + (b"a" * MIB + b"\n") * 20 + b'"\n', "a row of more than 16 MiB")
    put("huge.txt", huge, "huge.txt, line 1: a row of more than 16 MiB")
    put("commas.csv", b"," * (20 * MIB), "line 1: a row of more than 16 MiB")
    for ending, pack in PACKERS.items():
        # Pieces one after the other are one file, and cost little to make.
        put(f"blank.jsonl.{ending}", pack(b"\n" * MIB) * 400, "unfolds to more than")
        if ending in ("bz2", "xz"):
            continue
        put(f"spaces.jsonl.{ending}", pack(b" " * MIB) * 400, "a row of more than 16 MiB")
        put(f"deep.json.{ending}", pack(b"[" * MIB) * 400, "unfolds to more than")
    put("rows.jsonl.gz", gzip.compress((b'{"text": "' + b"a" * 1000 + b'"}\n') * 1000) * 300, "unfolds to more than")
    tables: dict[str, tuple[Any, str]] = {
        "values.parquet": (one_value("x" * (40 * MIB), 64), "a row of more than 16 MiB"),
        "long-value.parquet": (one_value("x" * (140 * MIB), 2), "unfolds to more than 128 MiB"),
        "rows.parquet": (one_value("ab", 2_000_000), "unfolds to more than 128 MiB"),
        "nulls.parquet": (pa.nulls(4_000_000, pa.string()), "unfolds to more than 128 MiB"),
    }
    for name, (column, said) in tables.items():
        pq.write_table(pa.table({"text": column}), folder / name, compression="zstd", dictionary_pagesize_limit=2**30)
        assert (folder / name).stat().st_size < 60_000
        made[name] = said
    return made


@pytest.fixture(scope="module")
def read_by_child(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("rows")
    made = write_all(folder)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), *made], capture_output=True, text=True, check=False, timeout=280
    )
    assert child.returncode == 0, child.stderr[-2000:]
    lines = {line[0]: line for line in map(json.loads, child.stdout.splitlines())}
    return {name: (said, lines[name]) for name, said in made.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="the child's size is read from /proc")
@pytest.mark.full
def test_bombs_and_giants_end_in_words_within_bounds(read_by_child: dict[str, tuple[str, list[Any]]]) -> None:
    for name, (said, (_, count, message, seconds, grown)) in read_by_child.items():
        assert (said in message) if said else (message == "" and count == 1), (name, message)
        assert len(message) < 2000, name
        assert seconds < 60, (name, seconds)
        assert grown < 1000, (name, grown)  # MiB


def error_of(folder: Path, name: str, content: bytes | None = None) -> str:
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(name, root=folder))
    return str(caught.value)


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Path]:
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jsonl"))
        yield tmp_path


@pytest.mark.skipif(os.name == "nt", reason="Windows has none of these")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fifo.jsonl", "is a pipe; rows are read more than once"),
        ("null.jsonl", "is a device; rows are read more than once"),
        ("s.jsonl", "is no file; rows are read more than once"),
        ("folder.jsonl", "is a folder; name a file in it"),
        ("loop.jsonl", "loop.jsonl"),
    ],
)
def test_what_is_no_file_is_refused_and_not_waited_for(odd: Path, name: str, said: str) -> None:
    assert said in error_of(odd, name)
    if name not in ("loop.jsonl", "folder.jsonl"):
        assert said in error_of(odd, f"{name[:3]}*{name[3:]}")  # by a pattern, too


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("NaN", "NaN is not JSON; write null"),
        ("-Infinity", "-Infinity is not JSON"),
        ("1e999", "the number 1e999 is too large for a float"),
        ("1" * 5000, "a number has 5,000 digits; write it as text"),
        ("[" * 90 + "]" * 90, ""),
        ("[" * 120 + "]" * 120, "nested too deeply"),
        ("[" * 900 + "]" * 900, "nested too deeply"),
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 120 + "1" + "}" * 120, "nested too deeply"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice in one object"),
        ('"\x00"', "NUL byte"),
        ('"\x01"', "Invalid control character"),
        ("1" * 1000, ""),
    ],
    ids=lambda value: value[:12],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_that_says_two_things_or_none(tmp_path: Path, value: str, said: str, ending: str) -> None:
    row = f'{{"text": {value}}}'
    content = (row + "\n" if ending == "jsonl" else f"[\n{row}\n]").encode()
    if not said:
        (tmp_path / f"a.{ending}").write_bytes(content)
        assert [row.value for row in read_rows(f"a.{ending}", root=tmp_path)] == [{"text": json.loads(value)}]
        return
    message = error_of(tmp_path, f"a.{ending}", content)
    assert said in message
    assert f"a.{ending}" in message
    assert len(message) < 500


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "UTF-8 text, but came the byte 0xff; it looks like UTF-16; save the file as UTF-8"),
        ("utf-16-le", "UTF-16"),
        ("utf-32-be", "UTF-16"),
        ("latin-1", "expected UTF-8 text, but came the byte 0xe9"),
        ("utf-8-sig", ""),
    ],
)
def test_other_encodings_are_told_and_a_mark_is_no_text(tmp_path: Path, ending: str, encoding: str, said: str) -> None:
    text = {
        "jsonl": '{"text": "café"}\n',
        "json": '[{"text": "café"}]',
        "csv": "text\ncafé\n",
        "txt": "café\n",
    }[ending]
    content = text.encode(encoding) if encoding != "utf-16" else b"\xff\xfe" + text.encode("utf-16-le")
    if not said:
        (tmp_path / f"a.{ending}").write_bytes(content)
        assert [row.value for row in read_rows(f"a.{ending}", root=tmp_path)] == [{"text": "café"}]
        return
    assert said in error_of(tmp_path, f"a.{ending}", content)
