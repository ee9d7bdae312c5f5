"""Bounds for reading what somebody else wrote: the kind and size of a file, the time and the memory that it may take.

    text = read_text(path, most=MIB)                    # a regular file alone, of so many bytes at most
    with within("the template", seconds=20, memory=GIB):
        ...                                             # BoundsError, wherever in this it would go beyond

A pipe in the place of a file would be waited for without end, and a device has none.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

MIB = 2**20
MOST_BYTES = 64 * MIB
"""Of a text that is read as a whole: the description of an adapter of ten thousand modules has three million."""

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class BoundsError(ValueError):
    """Reading took more time or memory than it may."""


def open_file(path: Path | str) -> io.BufferedReader:
    """Open a file to read its bytes. Raises OSError for a pipe, a socket or a device, without waiting for anybody."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        kind = stat.S_IFMT(os.fstat(handle).st_mode)
        if kind in _KINDS:
            raise OSError(errno.EINVAL, f"{_KINDS[kind]}, and not a file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def open_text(path: Path | str) -> TextIO:
    """Open a file to read its lines of text in UTF-8. Raises OSError as ``open_file`` does."""
    return io.TextIOWrapper(open_file(path), encoding="utf-8")


def read_bytes(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file. Raises OSError if it is no file, or has more than ``most`` bytes."""
    with open_file(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EINVAL, f"larger than {most / MIB:.3g} MiB, the most that is read", str(path))
    return data


def read_text(path: Path | str, most: int = MOST_BYTES) -> str:
    """The text of a file in UTF-8. Raises OSError as ``read_bytes`` does, and UnicodeDecodeError."""
    return read_bytes(path, most).decode("utf-8").replace("\r\n", "\n")


def check_files(folder: Path) -> None:
    """Raise OSError if a name in ``folder`` stands for a pipe, a socket or a device, which a library would wait for."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                kind = stat.S_IFMT(entry.stat().st_mode)
            except OSError:  # a link to nothing, or to itself: whoever opens it says so
                continue
            if kind in _KINDS:
                raise OSError(errno.EINVAL, f"{_KINDS[kind]}, and not a file", entry.path)


def check_safetensors(path: Path) -> None:
    """Look at what the safetensors library does not: raise ValueError or OSError if ``path`` is no file, if its header
    is cut or too long, or if a name stands in it twice (another reader might take the other tensor)."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header would have {length:,} bytes, and the file has {size:,}")
        if length > MOST_BYTES:
            raise ValueError(f"its header has {length / MIB:.0f} MiB")
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of ``pairs``, for ``json.loads``. Raises ValueError if a key is twice among them: another reader might
    take the other value."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice[:100]}' stands twice")
    return entries


@contextmanager
def panics() -> Iterator[None]:
    """A context in which a panic of a library in Rust (tokenizers, safetensors) becomes a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # it can be had nowhere, and is no Exception
            raise
        raise ValueError(f"the library that reads it gave up: {' '.join(str(error).split())[:300]}") from None


# Time and memory ----------------------------------------------------------------------------------------------------


class _Expired(BaseException):
    """Raised into a thread whose time is over. No handler of ``Exception`` on the way may keep it."""


@dataclass
class _Watched:
    thread: int
    until: float


_watched: dict[int, _Watched] = {}
_anything = threading.Condition()
_watcher: threading.Thread | None = None
_limiting = threading.RLock()
_TICK = 0.1


@contextmanager
def within(what: str, *, seconds: float, memory: int | None = None) -> Iterator[None]:
    """A context that ends by BoundsError if it takes more than ``seconds``, or more than ``memory`` further bytes.

    Time is looked at between two steps of Python: one call of a library is waited for. Memory is bounded where the
    system can do it (Linux); what another thread allocates meanwhile counts, too.
    """
    mine = _Watched(threading.get_ident(), time.monotonic() + seconds)
    try:
        try:
            _watch(mine)
            with _memory(memory):
                yield
        finally:
            _release(mine)
    except _Expired:
        _release(mine)
        raise BoundsError(f"{what} takes more than {seconds:g} seconds") from None
    except MemoryError:
        if memory is None:
            raise
        raise BoundsError(f"{what} takes more than {memory / MIB:,.0f} MiB of memory") from None


def _watch(mine: _Watched) -> None:
    global _watcher
    with _anything:
        _watched[id(mine)] = mine
        if _watcher is None:
            _watcher = threading.Thread(target=_look, daemon=True, name="trimtab-bounds")
            _watcher.start()
        elif len(_watched) == 1:
            _anything.notify()


def _release(mine: _Watched) -> None:
    _watched.pop(id(mine), None)
    _raise_in(mine.thread, None)  # one that was raised and has not arrived


def _look() -> None:
    while True:
        with _anything:
            while not _watched:
                _anything.wait()
        time.sleep(_TICK)
        now = time.monotonic()
        for one in list(_watched.values()):
            if now >= one.until and id(one) in _watched:
                one.until = now + 1  # once more then, should a destructor have swallowed this one
                _raise_in(one.thread, _Expired)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    what = ctypes.py_object(error) if error is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


def _forget() -> None:
    """In a child process there is no thread that watches."""
    global _watcher, _anything, _limiting
    _watcher, _anything, _limiting = None, threading.Condition(), threading.RLock()
    _watched.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def _memory(most: int | None) -> Iterator[None]:
    if most is None or not sys.platform.startswith("linux"):
        yield
        return
    import resource

    with _limiting:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        wanted = pages * resource.getpagesize() + most
        known = [limit for limit in (wanted, soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
