"""The folder in which a Ray of our own works, and those that killed commands have left."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_NAME = re.compile(r"trimtab-ray-(?P<host>[0-9a-f]{4})-(?P<process>\d+)-\w{8}")
_LONGEST = 14
"""Characters of the place for temporary files in which Ray's sockets, whose paths have 107 at most, still fit."""


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A new folder for Ray. It goes when the context ends; and if this process is killed before that, when the next one
    comes here."""
    usual = tempfile.gettempdir()
    parent = Path(usual if len(usual) <= _LONGEST else "/tmp")
    remove_left(parent)
    prefix = f"trimtab-ray-{_host()}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def remove_left(parent: Path) -> None:
    """Remove the folders in ``parent`` that processes of this user on this machine have left which are gone."""
    for folder in parent.glob("trimtab-ray-*"):
        named = _NAME.fullmatch(folder.name)
        if named is None or named["host"] != _host() or psutil.pid_exists(int(named["process"])):
            continue
        with suppress(OSError):
            if not folder.is_symlink() and (not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()):
                shutil.rmtree(folder, ignore_errors=True)


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"[:4]
