"""Reads rows from jsonl, json, csv, tsv and parquet files, and from datasets on the hub.

Text files are parsed here so that a message can name the line that is wrong. Hub datasets are read by ``datasets``,
which from version 4 on runs no code that comes with a dataset. Only a hub id uses the network.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.data.rows import Row
from trimtab.errors import DataError, nearest

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>.+))?")


def read_rows(source: str, *, root: Path) -> Iterator[Row]:
    """Yield the rows of a file or of a hub dataset.

    Args:
        source: a file (``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``), or a hub dataset as
            ``owner/name``, ``owner/name:split``, ``owner/name/config`` or ``owner/name/config:split``. The default
            split is ``train``; slices such as ``train[:500]`` work. A path that exists, or has the ending of a data
            file, is a file.
        root: the folder that relative paths start from.

    Raises DataError if the source is missing, cannot be reached, is damaged, or holds no row.
    """
    if not source.strip():
        raise DataError("The name of a data file is empty; give a path or a hub dataset such as owner/name.")
    path = root / Path(source).expanduser()
    hub = _HUB_ID.fullmatch(source)
    # A missing "owner/name" is more likely a mistyped path if it ends like a data file or "owner" is a folder here.
    like_a_path = path.suffix.lower() in _READERS or (root / source.split("/")[0]).is_dir()
    if path.exists() or hub is None or like_a_path:
        rows = _read_file(source, path)
    else:
        rows = _read_hub(source, hub["name"], hub["config"], hub["split"] or "train")
    count = 0
    for row in rows:
        count += 1
        yield row
    if not count:
        raise DataError(f"{source} holds no rows.")


def _read_file(source: str, path: Path) -> Iterator[Row]:
    if not path.exists():
        raise DataError(_missing(source, path))
    if path.is_dir():
        inside = ", ".join(_data_files(path)[:8]) or "it holds no data file"
        raise DataError(f"{source} is a folder; name a file in it ({inside}).")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{source}: expected a data file that ends in one of {', '.join(_READERS)}, but it ends in "
            f"'{path.suffix}'; convert or rename it."
        )
    try:
        yield from reader(source, path)
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error


def _missing(source: str, path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"There is no data file {source}: its folder {folder} does not exist."
    files = _data_files(folder)
    if near := nearest(path.name, files):
        return f"There is no data file {source} in {folder}. Did you mean {' or '.join(near)}?"
    return f"There is no data file {source} in {folder}; data files there: {', '.join(files[:8]) or 'none'}."


def _data_files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in _READERS)


def _decode(source: str, raw: bytes, line: int = 1) -> str:
    """``raw`` as UTF-8 text without a byte-order mark; its first line has the number ``line``."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        number = line + error.object.count(b"\n", 0, error.start)
        raise DataError(
            f"{source}, line {number}: expected UTF-8 text, but came the byte 0x{error.object[error.start]:02x}; "
            "save the file as UTF-8."
        ) from error


def _kind(value: Any) -> str:
    """The name of a value's type in JSON, for a message."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def _jsonl(source: str, path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = _decode(source, raw, number).strip()
            if not line:
                continue
            place = f"{source}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                shown = line if len(line) <= 60 else line[:57] + "..."
                hint = "; if the file is one JSON value over several lines, name it .json" if line in ("{", "[") else ""
                raise DataError(
                    f"{place}: expected one JSON object a line, but {_json_fault(error)}{hint}. The line is: {shown}"
                ) from error
            if not isinstance(value, dict):
                hint = " If the whole file is one list, name it .json." if isinstance(value, list) else ""
                raise DataError(f"{place}: expected one JSON object a line, but came {_kind(value)}.{hint}")
            yield Row(source, number, place, value)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"at column {error.colno}: {error.msg}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json(source: str, path: Path) -> Iterator[Row]:
    text = _decode(source, path.read_bytes())
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
            # One object per line in a file named .json: many hub datasets store their rows in this way.
            yield from _jsonl(source, path)
            return
        place = f"{source}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else source
        raise DataError(f"{place}: expected JSON, but {_json_fault(error)}; repair the file.") from error
    for number, row in enumerate(_list_in(source, value), start=1):
        place = f"{source}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected a JSON object, but came {_kind(row)}.")
        yield Row(source, number, place, row)


def _list_in(source: str, value: Any) -> list[Any]:
    """The rows of a JSON file: the value itself, or the one list of objects in it."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"{source}: expected a list of rows, or an object with one such list, but came {_kind(value)}.")
    lists = {
        key: held
        for key, held in value.items()
        if isinstance(held, list) and all(isinstance(row, dict) for row in held)
    }
    if len(lists) != 1:
        raise DataError(
            f"{source}: expected a list of rows, or an object with one list of objects, but the lists of objects in it "
            f"are: {', '.join(lists) or 'none'}. Save the rows alone, as a list or as jsonl."
        )
    return next(iter(lists.values()))


def _csv(source: str, path: Path) -> Iterator[Row]:
    # Fields stay strings: guessing types would turn the answer "1" into a number, and "None" into a missing value.
    records = _csv_records(source, path)
    if not records:
        return
    header = [name.strip() for name in records[0][1]]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{source}: the header names a column twice: {', '.join(twice)}.")
    for number, (line, fields) in enumerate(records[1:], start=1):
        place = f"{source}, row {number} (line {line})"
        if len(fields) != len(header):
            raise DataError(
                f"{place}: expected {len(header)} fields, as in the header ({', '.join(header)}), but came "
                f"{len(fields)}; put fields that contain the separator into double quotes."
            )
        yield Row(source, number, place, dict(zip(header, fields, strict=True)))


def _csv_records(source: str, path: Path) -> list[tuple[int, list[str]]]:
    """The fields of every record that is not blank, each with the number of the record's last line."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    text = _decode(source, path.read_bytes())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(2**31 - 1)
    try:
        return [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.line_num}: bad CSV: {error}; check the quotes.") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(source: str, path: Path) -> Iterator[Row]:
    # pyarrow reads the file in place; `datasets` would first copy it into its own cache.
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield Row(source, number, f"{source}, row {number}", value)
    except pyarrow.ArrowException as error:
        raise DataError(f"{source}: not a readable parquet file: {_first_line(error)}") from error


def _read_hub(source: str, name: str, config: str | None, split: str) -> Iterator[Row]:
    import datasets

    try:
        for number, value in enumerate(datasets.load_dataset(name, config, split=split), start=1):
            yield Row(source, number, f"{source}, row {number}", dict(value))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{source}: there is no such file, and the hub has no dataset '{name}' that you may read; check the "
            f"spelling, or log in if it is private. ({_first_line(error)})"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{source}: there is no such file, and the hub cannot be reached to look for a dataset '{name}'; check "
            f"the network (and HF_HUB_OFFLINE), or download the rows and name their file. ({_first_line(error)})"
        ) from error
    except Exception as error:
        # What the hub's readers raise is not documented.
        raise DataError(f"{source}: the hub dataset '{name}' cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
