"""The kinds of files that rows are read from: jsonl, json, csv, tsv, txt, parquet.

Text is parsed here so that a message can name the line that is wrong, and strictly, so that no row means something else
than it says: a key that stands twice, NaN, and a number that no float can hold are errors.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.data.opening import ROW, UNFOLDED, Budget, endings, numbered_lines, too_long, whole_text
from trimtab.data.rows import Row
from trimtab.errors import DataError
from trimtab.machine import GIB, available_memory

DEPTH = 100
"""How deep a row may be nested; what is deeper would end in templates and in other libraries."""

DIGITS = 1_000
"""Most digits of a whole number; Python itself refuses to write out some thousands more."""

PARSED = 8
"""A JSON file takes about so many times its size in memory, since it can only be parsed in one piece."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number has {len(text):,} digits; write it as text, in quotes")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:60]} is too large for a float; write it as text, in quotes")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null for what is missing, or a text in quotes")


_JSON = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant, strict=True
)


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises ValueError with what is wrong with it."""
    try:
        value = _JSON.decode(text)
        if text.count("{") + text.count("[") > DEPTH and _is_deeper(value, DEPTH):
            raise RecursionError
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            part
            for held in level
            for part in (held.values() if isinstance(held, dict) else held if isinstance(held, list) else ())
        ]
        if not level:
            return False
    return True


def _fault(error: ValueError) -> str:
    return f"at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)


def _kind(value: Any) -> str:
    """The name of a value's type in JSON, for a message."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def _jsonl(source: str, path: Path) -> Iterator[Row]:
    for number, text in numbered_lines(source, path, blank=False):
        line = text.strip().removeprefix("\ufeff")  # files with a mark each, put together
        if not line:
            continue
        place = f"{source}, line {number}"
        try:
            value = _parsed(line)
        except ValueError as error:
            shown = line if len(line) <= 60 else line[:57] + "..."
            hint = "; if the file is one JSON value over several lines, name it .json" if line in ("{", "[") else ""
            raise DataError(
                f"{place}: expected one JSON object a line, but {_fault(error)}{hint}. The line is: {shown}"
            ) from error
        if not isinstance(value, dict):
            hint = " If the whole file is one list, name it .json." if isinstance(value, list) else ""
            raise DataError(f"{place}: expected one JSON object a line, but came {_kind(value)}.{hint}")
        yield Row(source, number, place, value)


def _json(source: str, path: Path) -> Iterator[Row]:
    needed = PARSED * path.stat().st_size
    if needed > (free := available_memory()):
        raise DataError(
            f"{source}: a JSON file is read in one piece, which takes about {needed / GIB:.1f} GiB of memory, and "
            f"{free / GIB:.1f} are free; save the rows as jsonl, one object a line."
        )
    text = whole_text(source, path)
    try:
        value = _parsed(text.strip())
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
            # One object per line in a file named .json: many hub datasets store their rows in this way.
            yield from _jsonl(source, path)
            return
        above = text[: len(text) - len(text.lstrip())].count("\n")
        place = f"{source}, line {error.lineno + above}" if isinstance(error, json.JSONDecodeError) else source
        raise DataError(f"{place}: expected JSON, but {_fault(error)}; repair the file.") from error
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
    header: list[str] = []
    number = 0
    for line, fields in _csv_records(source, path):
        if not header:
            header = [name.strip() for name in fields]
            twice = sorted(name for name, count in Counter(header).items() if count > 1)
            if twice:
                raise DataError(f"{source}: the header names a column twice: {_some(twice)}.")
            _require_separated(source, path, header)
            continue
        number += 1
        place = f"{source}, row {number} (line {line})"
        if len(fields) != len(header):
            raise DataError(
                f"{place}: expected {len(header)} fields, as in the header ({_some(header)}), but came "
                f"{len(fields)}; put fields that contain the separator into double quotes."
            )
        yield Row(source, number, place, dict(zip(header, fields, strict=True)))


def _require_separated(source: str, path: Path, header: list[str]) -> None:
    """Raise DataError if the one column of ``header`` looks like several, by the separator of another kind of file."""
    wanted = {".tsv": (("a comma", ",", ".csv"),)}.get(
        endings(path)[0], (("a tab", "\t", ".tsv"), ("a semicolon", ";", ""))
    )
    for name, separator, ending in wanted:
        if len(header) == 1 and separator in header[0]:
            cure = f"name the file {ending}" if ending else "save it with commas"
            raise DataError(
                f"{source}: its columns are separated by {name} ({header[0][:60]}), and not as its ending says; {cure}."
            )


def _some(names: list[str], most: int = 12) -> str:
    return ", ".join(name[:60] for name in names[:most]) + (", ..." if len(names) > most else "")


def _csv_records(source: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of every record that is not blank, each with the number of the record's last line."""
    delimiter = "\t" if endings(path)[0] == ".tsv" else ","
    # A lone carriage return ends a line, too, as in files of an old Mac.
    lines = (part for _, line in numbered_lines(source, path) for part in io.StringIO(line, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    before = csv.field_size_limit()
    try:
        while True:
            csv.field_size_limit(ROW)  # it is the whole process's: set around each record alone
            try:
                fields = next(reader, None)
            finally:
                csv.field_size_limit(before)
            if fields is None:
                return
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        fault = too_long() if "field limit" in str(error) else f"bad CSV: {error}; check the quotes."
        raise DataError(f"{source}, line {reader.line_num}: {fault}") from error


def _text(source: str, path: Path) -> Iterator[Row]:
    # A line is a text, as `datasets` and those who build on it read such files.
    for number, line in numbered_lines(source, path, blank=False):
        if (text := line.rstrip("\r\n")) and not text.isspace():
            yield Row(source, number, f"{source}, line {number}", {"text": text})


def _parquet(source: str, path: Path) -> Iterator[Row]:
    # pyarrow reads the file in place; `datasets` would first copy it into its own cache.
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    budget = Budget(source, path, free=2 * UNFOLDED)
    try:
        with ParquetFile(path) as file:
            groups = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
            budget.take(sum(groups))
            budget = Budget(source, path, free=2 * UNFOLDED)
            # A value that stands once in the file may be that of many rows, so the rows of a batch are few where a
            # single value could be large; not in a large file, which has its size from somewhere.
            fewest = 1 if path.stat().st_size < ROW else 16
            size = min(1024, max(fewest, 256 * 2**20 // max(1, *groups, 1)))
            for batch in file.iter_batches(batch_size=size):
                for index, column in enumerate(batch.columns):
                    if pyarrow.types.is_dictionary(column.type):  # counted as what it stands for
                        batch = batch.set_column(index, batch.schema.names[index], column.dictionary_decode())
                if batch.nbytes > ROW * max(1, batch.num_rows):
                    raise DataError(f"{source}, row {number + 1}: {too_long()}")
                budget.take(batch.nbytes + 128 * batch.num_rows)
                for value in batch.to_pylist():
                    number += 1
                    yield Row(source, number, f"{source}, row {number}", columnar(value))
    except pyarrow.ArrowException as error:
        if isinstance(error, MemoryError):
            raise
        raise DataError(f"{source}: not a readable parquet file: {first_line(error)}") from error


def columnar(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` of a columnar file without the nulls in its objects: there every object has all the keys that any other
    in the column has, and null where the row that was written had no such key. The row's own keys stay."""
    return {key: _filled(value) if isinstance(value, dict | list) else value for key, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(held) for key, held in value.items() if held is not None}
    return [_filled(held) for held in value] if isinstance(value, list) else value


def first_line(error: Exception) -> str:
    """The first line of what another library says, for a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
    ".parquet": _parquet,
}
"""How a file with such an ending is read, under the name that the user gave it."""
