"""Where rows come from: files, patterns of file names, datasets on the hub or saved in a folder; whole or in part.

A source is written as a path, or with more to say as a mapping (`Source`). Only a hub id uses the network. Hub datasets
are read by ``datasets``, which from version 4 on runs no code that comes with a dataset.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from trimtab.data.opening import COMPRESSED, endings, require_file
from trimtab.data.pictures import ENDINGS, labelled_files
from trimtab.data.readers import READERS, columnar, first_line
from trimtab.data.rows import Row, Source
from trimtab.errors import DataError, did_you_mean, nearest

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>.+))?")
_SLICE = re.compile(r"(?P<path>.+)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]")
_SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files by which a folder is known that ``datasets`` saved."""


def rows_of(source: Source, *, root: Path) -> Iterator[Row]:
    """The rows of ``source``, with columns under our keys; `read_rows` says what is raised."""
    rows = read_rows(source.path, root=root)
    return (_renamed(row, source.columns) for row in rows) if source.columns else rows


def pictures_of(source: Source, *, root: Path) -> Iterator[Path]:
    """The files of pictures that the rows of ``source`` name under ``image``, up to the first row that has nothing
    there. Whether they are there is not looked at. Raises DataError as reading the rows does."""
    for row in rows_of(source, root=root):
        image = row.value.get("image")
        if isinstance(image, dict):
            image = None if image.get("bytes") else image.get("path")
        if isinstance(image, str):
            yield folder_of(row, root) / Path(image).expanduser()
        elif row.value.get("image") is None:
            return


def folder_of(row: Row, root: Path) -> Path:
    """The folder that the paths in a row start from."""
    place = root / Path(row.source).expanduser()
    return place if place.is_dir() else place.parent


def name_of(path: str) -> str:
    """A short name for the rows of a source, as that of a file may be: the file's own, without its endings."""
    place = Path(_sliced(path)[0])
    while place.suffix.lower() in READERS or place.suffix.lower() in COMPRESSED:
        place = place.with_suffix("")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", place.name).strip(".-") or "rows"


@dataclass(frozen=True)
class _Slice:
    """A part of the rows: each end a number, or a percentage of all; negative numbers count from the end."""

    start: str | None
    stop: str | None

    def of(self, rows: Iterable[Row]) -> Iterator[Row]:
        ends = (self.start, self.stop)
        if not any(end and ("%" in end or "-" in end) for end in ends):
            return islice(rows, int(self.start or 0), int(self.stop) if self.stop else None)
        held = list(rows)  # how many there are is known when all are read
        return iter(held[slice(*(self._place(end, len(held)) for end in ends))])

    @staticmethod
    def _place(end: str | None, count: int) -> int | None:
        if end is None:
            return None
        return round(int(end[:-1]) * count / 100) if end.endswith("%") else int(end)


def _sliced(path: str) -> tuple[str, _Slice | None]:
    """A path without the slice at its end, and that slice."""
    found = _SLICE.fullmatch(path)
    return (found["path"], _Slice(found["start"], found["stop"])) if found else (path, None)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """``row`` with the values of its ``columns`` under our keys; what else it holds stays."""
    taken = {key: _held(row, key, column) for key, column in columns.items()}
    rest = {key: value for key, value in row.value.items() if key not in columns.values()}
    for column in columns.values():
        rest = rest if column in row.value else _without(rest, column.split("."))
    return replace(row, value={**rest, **taken})


def _without(value: dict[str, Any], part: Sequence[str]) -> dict[str, Any]:
    """``value`` without the ``part`` of it that such keys lead to, nor objects that hold nothing else."""
    key, *deeper = part
    rest = {name: held for name, held in value.items() if name != key}
    if deeper and isinstance(value.get(key), dict) and (left := _without(value[key], deeper)):
        return {**rest, key: left}
    return rest


def _held(row: Row, key: str, column: str) -> Any:
    """What a row holds under ``column``, where dots reach into objects."""
    if column in row.value:
        return row.value[column]
    value: Any = row.value
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            known = [str(name)[:60] for name in row.value]
            raise DataError(
                f"{row.place}: data.columns says that '{key}' is in the column '{column}', which is not there; "
                f"columns: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}.{did_you_mean(column, known)}"
            )
        value = value[part]
    return value


def is_local(path: str, root: Path) -> bool:
    """Whether ``path`` means a file, a folder or a pattern, and not a dataset on the hub."""
    bare = _sliced(path)[0]
    # A missing "owner/name" is more likely a mistyped path if it ends like a data file or "owner" is a folder here.
    return (
        not _HUB_ID.fullmatch(bare)
        or endings(bare)[0] in READERS
        or (root / Path(bare).expanduser()).exists()
        or (root / bare.split("/")[0]).is_dir()
    )


def read_rows(source: str, *, root: Path) -> Iterator[Row]:
    """Yield the rows of a file or of a hub dataset.

    Args:
        source: a file (``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, ``.txt``, ``.parquet``; the text files
            also compressed: ``.gz``, ``.bz2``, ``.xz``, ``.zst``); a pattern such as ``data/*.jsonl``, whose files are
            read in the order of their names; a folder that ``datasets`` saved, or ``folder:split``; a
            folder with a folder of pictures for each label; or a hub dataset
            as ``owner/name``, ``owner/name:split``, ``owner/name/config`` or ``owner/name/config:split``. The default
            split is ``train``. A path that exists, or has the ending of a data file, is a file. A slice at the end
            takes a part of the rows: ``rows.jsonl[:500]``, ``rows.jsonl[10%:20%]``, ``rows.jsonl[-100:]``.
        root: the folder that relative paths start from.

    Raises DataError if the source is missing, cannot be reached, is damaged, or holds no row.
    """
    if not source.strip():
        raise DataError("The name of a data file is empty; give a path or a hub dataset such as owner/name.")
    path, part = (source, None) if (root / source).exists() else _sliced(source)
    rows = _read_local(path, root) if is_local(path, root) else _read_hub(source, path, part)
    if part is not None and is_local(path, root):
        rows = part.of(rows)
    count = 0
    for row in rows:
        count += 1
        yield row
    if not count:
        raise DataError(f"{source} holds no rows.")


def local_files(source: str, root: Path) -> list[Path]:
    """The files that ``source`` means, or the folder that it is read from; none of a hub id, or where nothing is there.
    ``root`` is the folder that relative paths start from."""
    path = source if (root / source).exists() else _sliced(source)[0]
    if not is_local(path, root):
        return []
    for name in (path, path.rpartition(":")[0]):
        if name and (place := root / Path(name).expanduser()).exists():
            return [place]
    return _matching(root / Path(path).expanduser())


def _read_local(source: str, root: Path) -> Iterator[Row]:
    path = root / Path(source).expanduser()
    if path.exists():
        yield from _read_file(source, path)
        return
    folder, sign, split = source.rpartition(":")
    if sign and (root / Path(folder).expanduser()).is_dir():
        yield from _read_folder(source, root / Path(folder).expanduser(), split)
        return
    files = _matching(path)
    if not files:
        raise DataError(_missing(source, path))
    for file in files:
        relative = path.is_relative_to(root) and not Path(source).is_absolute()
        yield from _read_file(str(file.relative_to(root)) if relative else str(file), file)


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(path.name if path.parent.is_dir() else str(path))


def _matching(path: Path) -> list[Path]:
    """The files that a pattern names, sorted; none where ``path`` is no pattern. As in a shell, * leaves out names that
    begin with a dot; so Path.glob is not enough."""
    if not _is_pattern(path):
        return []
    literal = path.parent.is_dir()  # what is there may have brackets in its name
    pattern = str(Path(glob.escape(str(path.parent))) / path.name) if literal else str(path)
    return sorted(file for name in glob.iglob(pattern, recursive=True) if not (file := Path(name)).is_dir())  # noqa: PTH207


def _read_file(source: str, path: Path) -> Iterator[Row]:
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED):
            yield from _read_folder(source, path, None)
            return
        pictures = labelled_files(path)
        if (first := next(pictures, None)) is not None:
            for number, (file, label) in enumerate(chain([first], pictures), start=1):
                image = str(file.relative_to(path))
                yield Row(source, number, f"{source}, {image}", {"image": image, "label": label})
            return
        if any(entry.suffix.lower() in ENDINGS for entry in path.iterdir()):
            raise DataError(
                f"{source} holds pictures that have no label: put them into a folder for each label, or name a file of "
                "rows with the keys image and label."
            )
        inside = ", ".join(_data_files(path)[:8]) or "it holds no data file"
        raise DataError(
            f"{source} is a folder; name a file in it ({inside}), a pattern such as {source.rstrip('/')}/*.jsonl, or a "
            f"split of a dataset ({source.rstrip('/')}:train)."
        )
    ending, packed = endings(path)
    reader = READERS.get(ending)
    if reader is None or (packed and ending == ".parquet"):
        raise DataError(
            f"{source}: expected a data file that ends in one of {', '.join(READERS)} (the text files also with "
            f"{', '.join(COMPRESSED)} after it), but it ends in '{ending}{packed}'; convert or rename it."
        )
    try:
        require_file(source, path)
        yield from reader(source, path)
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    except MemoryError as error:
        raise DataError(f"{source}: there is not enough memory to read it; cut it into smaller files.") from error


def _missing(source: str, path: Path) -> str:
    if _is_pattern(path):
        return (
            f"There is no data file {source}: no file has such a name. In a pattern * is any name and ** all folders "
            "below; a part of the rows is written [:500] or [10%:]."
        )
    folder = path.parent
    if not folder.is_dir():
        return f"There is no data file {source}: its folder {folder} does not exist."
    files = _data_files(folder)
    if near := nearest(path.name, files):
        return f"There is no data file {source} in {folder}. Did you mean {' or '.join(near)}?"
    return f"There is no data file {source} in {folder}; data files there: {', '.join(files[:8]) or 'none'}."


def _data_files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if endings(entry)[0] in READERS)


def _read_folder(source: str, folder: Path, split: str | None) -> Iterator[Row]:
    """The rows of a dataset in a folder: one that ``save_to_disk`` wrote, or a copy of one of the hub's."""
    import datasets

    try:
        if any((folder / name).is_file() for name in _SAVED):
            held = datasets.load_from_disk(str(folder))
            if isinstance(held, datasets.DatasetDict):
                name = split or "train"
                if name not in held:
                    raise DataError(
                        f"{source}: the dataset has no split '{name}'; it has {', '.join(held)}."
                        f"{did_you_mean(name, held)}"
                    )
                held = held[name]
            elif split not in (None, "train"):
                raise DataError(f"{source}: the dataset has no splits; name the folder alone.")
        else:
            held = datasets.load_dataset(str(folder), split=split)
        for number, value in enumerate(held, start=1):
            yield Row(source, number, f"{source}, row {number}", columnar(value))
    except (DataError, OSError):
        raise
    except Exception as error:
        # What the readers of `datasets` raise is not documented.
        raise DataError(f"{source}: the dataset in this folder cannot be read: {first_line(error)}") from error


def _read_hub(source: str, path: str, part: _Slice | None) -> Iterator[Row]:
    import datasets

    hub = _HUB_ID.fullmatch(path)
    assert hub is not None, "what is not local is a hub id"
    name, config, split = hub["name"], hub["config"], hub["split"] or "train"
    if part is not None:
        split += f"[{part.start or ''}:{part.stop or ''}]"
    try:
        for number, value in enumerate(datasets.load_dataset(name, config, split=split), start=1):
            yield Row(source, number, f"{source}, row {number}", columnar(value))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{source}: there is no such file, and the hub has no dataset '{name}' that you may read; check the "
            f"spelling, or log in if it is private. ({first_line(error)})"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{source}: there is no such file, and the hub cannot be reached to look for a dataset '{name}'; check "
            f"the network (and HF_HUB_OFFLINE), or download the rows and name their file. ({first_line(error)})"
        ) from error
    except Exception as error:
        # What the hub's readers raise is not documented.
        raise DataError(f"{source}: the hub dataset '{name}' cannot be read: {first_line(error)}") from error
