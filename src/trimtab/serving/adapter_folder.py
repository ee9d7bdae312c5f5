"""The one folder that adapters may be added from while the server runs, and nothing outside of it."""

from __future__ import annotations

import re
from pathlib import Path

from trimtab.errors import ConfigError
from trimtab.serving.replies import HttpError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")


def checked_name(name: str) -> str:
    """``name``, if an adapter can be asked for by it. Raises HttpError."""
    if not _NAME.fullmatch(name):
        raise HttpError(
            400, f"name: expected letters, digits, '.', '_', ':' and '-', at most 100, got {name[:80]!r}", param="name"
        )
    return name


class AdapterFolder:
    """A folder whose subfolders may be added as adapters. Raises ConfigError if ``path`` is no folder."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(f"--adapters-from {path}: no such folder")
        self._root = path.resolve(strict=True)

    def find(self, said: str) -> Path:
        """The folder that ``said`` names: below this one, with links followed, and none of its files elsewhere.

        Raises HttpError for anything else. It is the same one whether there is nothing or nothing allowed, so that
        nobody can ask for what lies on this machine.
        """
        refused = HttpError(
            400,
            f"path: no adapter {said[:200]!r} in the folder that adapters may be added from",
            param="path",
            code="bad_path",
        )
        try:
            place = (self._root / said).resolve(strict=True)
            if place == self._root or not self._inside(place) or not place.is_dir():
                raise refused
            if any(not self._inside(each.resolve()) for each in place.rglob("*") if each.is_symlink()):
                raise refused
        except (OSError, ValueError, RuntimeError):  # names with a zero byte, loops of links
            raise refused from None
        return place

    def _inside(self, place: Path) -> bool:
        return place.is_relative_to(self._root)
