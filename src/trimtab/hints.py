"""Commands that are shown to be pasted into a shell. All are written here, so that none of them breaks at a space."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path


def pasted(verb: str, *words: str | Path, text: str | None = None) -> str:
    """The command ``trimtab VERB WORDS...``, quoted for the shell.

    ``text`` is a last word that is free text: it may begin with a dash and is still no option.
    """
    said = [*map(str, words)]
    if text is not None:
        said += ["--", text] if text.startswith("-") else [text]
    return " ".join(["trimtab", verb, *map(quoted, said)])


def quoted(word: str) -> str:
    """``word`` as a shell takes it for one word, on one line."""
    if os.name == "nt":
        return subprocess.list2cmdline([word])
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(letter if letter.isprintable() else _ESCAPES.get(letter, "?") for letter in _slashed(word))
    return f"$'{escaped}'"


def seen_from_here(path: Path) -> Path:
    """``path`` as seen from the working directory, where it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def _slashed(word: str) -> str:
    return word.replace("\\", "\\\\").replace("'", "\\'")
