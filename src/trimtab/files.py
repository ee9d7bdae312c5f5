"""Files and folders written safely: a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from trimtab.reading import open_file, open_text, read_text


class MadeMeanwhileError(FileExistsError):
    """Another process has made the file that was to be a new one."""


def write_atomically(path: Path | str, write: Callable[[Path], object], *, new: bool = False) -> None:
    """Let ``write`` make a file of the name of ``path`` in a temporary folder beside it, then move that into place in
    one step. ``new``: raise MadeMeanwhileError if another process has made one by then, which stays."""
    target = Path(path)
    with _named(target), temporary_folder(target.parent) as folder:
        fresh = folder / target.name
        write(fresh)
        open_to_readers(folder)
        if new:
            try:
                target.touch(exist_ok=False)
            except FileExistsError as error:
                raise MadeMeanwhileError(error.errno, error.strerror, str(target)) from None
        fresh.replace(target)


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Let an error of the system that names no file, as where a disk is full, or a temporary one, name ``target``."""
    try:
        yield
    except OSError as error:
        if error.filename is None or ".saving-" in str(error.filename):
            error.filename = str(target)
        raise


def write_folder(
    target: Path, fill: Callable[[Path], None], *, replace: bool, stays: Callable[[str], bool] = lambda name: False
) -> None:
    """Let ``fill`` write into a new folder beside ``target``, then give it that name in one step.

    If ``target`` exists by then, ``replace`` decides whether it is replaced or kept; an empty folder is replaced. What
    ``stays`` in a folder that is replaced, by its name, is taken along, unless ``fill`` writes one of that name.
    """
    with temporary_folder(target.parent) as folder:
        fresh, old = folder / "new", folder / _REPLACED / target.name
        fresh.mkdir()
        fill(fresh)
        open_to_readers(fresh)
        if replace and target.exists():
            for entry in target.iterdir():
                if stays(entry.name) and not (fresh / entry.name).exists():
                    copy = shutil.copytree if entry.is_dir() else shutil.copy2
                    copy(entry, fresh / entry.name)
            old.parent.mkdir()
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            if replace or not target.exists():
                raise


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, for what is moved to its place once it is complete. It goes when the context ends,
    and if this process is killed before that, when the next one comes here.

    If there is still a folder `COMPLETE` in it at the end, it stays: whoever comes next has to finish the move.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    folder = parent / f".saving-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    _ours.add(folder.name)
    try:
        folder.mkdir()
        yield folder
    finally:
        if not (folder / COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        _ours.discard(folder.name)


COMPLETE = "complete"
_TEMPORARY = re.compile(r"\.saving-(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}")
_OF_0_1 = re.compile(r"\.saving-[a-z0-9_]{8}")  # does not say whose it was
_REPLACED = "replaced"
_ours: set[str] = set()
"""The names of the temporary folders that this process has now."""


def remove_leftovers(folder: Path, *, alone: bool = False) -> None:
    """Remove the temporary folders that killed processes left in ``folder``.

    ``alone``: the caller holds a lock, so that nobody else can be writing here or in the folders inside. Otherwise a
    temporary folder stays while its process may be alive: on another machine, for a day.
    """
    for left in _leftovers(folder, alone=alone):
        for old in left.glob(f"{_REPLACED}/*"):  # killed after this went and before the new one came
            if not (left.parent / old.name).exists():
                old.rename(left.parent / old.name)
        shutil.rmtree(left, ignore_errors=True)


def _leftovers(folder: Path, *, alone: bool = False) -> list[Path]:
    """What `remove_leftovers` would remove."""
    found = folder.rglob(".saving-*") if alone else folder.glob(".saving-*")
    return sorted(one for one in found if _is_left(one, alone))


def unfinished(folder: Path) -> list[Path]:
    """The folders `COMPLETE` that killed processes left in ``folder`` and had not moved to their place."""
    return [complete for left in _leftovers(folder) if (complete := left / COMPLETE).is_dir()]


def _is_left(folder: Path, alone: bool) -> bool:
    """Whether ``folder`` is a temporary folder of a process that is gone."""
    if (known := _TEMPORARY.fullmatch(folder.name)) is None:
        return alone and _OF_0_1.fullmatch(folder.name) is not None
    if alone or folder.name in _ours:
        return folder.name not in _ours
    process = int(known["process"])
    if known["host"] == _host():
        return process == os.getpid() or not _is_alive(process)
    with suppress(OSError):
        return time.time() - folder.stat().st_mtime > 24 * 60 * 60
    return False


def _is_alive(process: int) -> bool:
    from psutil import pid_exists  # takes some milliseconds, and a leftover is rare

    return pid_exists(process)


@cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def open_to_readers(folder: Path) -> None:
    """Let whoever may read ``folder`` read the files in it; some writers make files for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def write_text(path: Path | str, text: str, *, new: bool = False) -> None:
    """Write ``text`` as UTF-8; ``new`` as in `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), new=new)


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused, since JSON has no word for them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> None:
    """Write one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, in place. The same tensors and metadata give the same bytes; safetensors alone would
    put the metadata in an order that differs from process to process."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=dict(metadata))
    with Path(path).open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": dict(sorted(metadata.items()))}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def content_digest(path: Path) -> str:
    """The SHA-256 of what a file holds. One that has not changed since this process looked at it is not read again."""
    stat = path.stat()
    return _content_digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _content_digest(path: Path, *as_it_is: int) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path | str) -> Any:
    """Read one JSON value."""
    return json.loads(read_text(path))


def read_jsonl(path: Path | str) -> Iterator[Any]:
    """Yield the value of every line that is not blank."""
    with open_text(path) as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)
