"""Files and folders written safely: a reader sees the old one or the new one, never half of either. And locks."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from trimtab.errors import RunError


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary sibling of ``path``, then move that into place in one step."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_folder(target: Path, fill: Callable[[Path], None], *, replace: bool) -> None:
    """Let ``fill`` write into a new folder beside ``target``, then give it that name in one step.

    If ``target`` exists by then, ``replace`` decides whether it is replaced or kept; an empty folder is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid4().hex}")
    old = target.with_name(f"{fresh.name}.old")
    fresh.mkdir()
    try:
        fill(fresh)
        for file in fresh.rglob("*"):
            if file.is_file():  # some writers make files that only their owner may read
                file.chmod(fresh.stat().st_mode & 0o666)
        if replace and target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            if replace or not target.exists():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused, since JSON has no word for them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> None:
    """Write one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path | str) -> Any:
    """Read one JSON value."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path: Path | str) -> Iterator[Any]:
    """Yield the value of every line that is not blank."""
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock ``file``, which is released in any case when the process ends.

    Raises RunError if another process holds it.
    """
    from filelock import FileLock, Timeout  # only studies lock, and nearly everything imports this module

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(file).acquire(timeout=0)
    except Timeout:
        raise RunError(f"{file}: another process is at work here; wait for it, or choose another folder") from None
    with held:
        yield
