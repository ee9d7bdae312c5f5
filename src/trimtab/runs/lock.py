"""One process at a time works in the folder of a run, a study or a search: the one that holds the folder's lock.

The system lets go of a lock when its process ends, however that ends. Where the file system has no locks of its own, a
file that names process and machine stands in: that of a dead process here is taken over, one of another machine is not.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from trimtab.errors import RunError

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def locked(file: Path, what: str = "folder") -> Iterator[None]:
    """Hold the lock ``file``, whose folder is made if there is none. A folder that is left without any other file is
    removed again. ``what``: the folder in messages.

    Raises RunError if another process holds it, or if its folder cannot be written.
    """
    from filelock import Timeout

    folder = file.parent
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(file)
    except Timeout:
        raise RunError(
            f"{folder}: {_holder(file)} is at work here; wait until it is done, or choose another folder"
        ) from None
    except OSError as error:
        raise RunError(
            f"{folder}: the {what} cannot be written ({error.strerror or error}); choose another output"
        ) from None
    try:
        # Beside the lock itself, since a text in it tells the next one who is here.
        me = {"process": os.getpid(), "machine": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M}"}
        _note(lock, file, json.dumps(me))
        yield
    finally:
        _note(lock, file, "")
        with suppress(OSError):
            if [entry.name for entry in folder.iterdir()] == [file.name]:
                file.unlink()
                for place in made:
                    place.rmdir()
        with suppress(OSError):
            lock.release()


def _acquire(file: Path) -> Any:
    from filelock import FileLock, SoftFileLock

    try:
        lock = FileLock(file)
        lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        lock = SoftFileLock(file)
        lock.acquire(timeout=0)
    return lock


def _note(lock: Any, file: Path, text: str) -> None:
    """Write ``text`` into the lock's file, unless that is all there is of the lock."""
    from filelock import SoftFileLock

    if not isinstance(lock, SoftFileLock):
        with suppress(OSError):
            file.write_text(text, encoding="utf-8")


def _holder(file: Path) -> str:
    """Who holds the lock, as far as its file tells."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    try:
        said = json.loads(text)
        process, machine, since = said["process"], said["machine"], f", since {said['since']}"
    except (ValueError, TypeError, KeyError):
        lines = text.split("\n")
        if len(lines) < 2 or not lines[0].isdigit():
            return "another process"
        process, machine, since = lines[0], lines[1], ""
    if machine == socket.gethostname():
        return f"another process ({process}{since})"
    return f"a process on the machine {machine} ({process}{since}; if it is no more, remove {file})"
