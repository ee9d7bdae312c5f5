"""Folders written whole: a reader sees a complete folder or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def write_folder(target: Path, fill: Callable[[Path], None], *, replace: bool) -> None:
    """Let ``fill`` write into a new folder beside ``target``, then give it that name in one step.

    If there is a folder at ``target`` by then, ``replace`` decides whether it goes or stays; an empty one goes.
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
