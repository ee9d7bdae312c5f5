"""Ends this process at the n-th change that it makes under a folder.

An audit hook sees every opening for writing, renaming, removing, linking, making of a folder and change of a mode that
Python does. Files that Rust and C++ write (safetensors, tokenizers, torch.save) make it an event of their own: see
`announce_native_writes`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NATIVE = "tests.native_write"
KILLED = 66
"""The exit code of a process that was ended here."""

# Event -> where its arguments have a path and the descriptor of the folder that the path is relative to.
_CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
}


class Changes:
    """Counts the changes under ``folder``; at number ``last`` (from 1) the process ends, just before the change or,
    if ``opened``, with the file open and empty. ``seen``: the changes so far in words, and which of them are openings.
    """

    def __init__(self, folder: Path, last: int = 0, *, opened: bool = False) -> None:
        self.seen: list[tuple[str, bool]] = []
        self._folder = os.path.realpath(folder)
        self._last, self._opened = last, opened
        self._busy = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or (event not in _CHANGES and event not in ("open", NATIVE)):
            return
        self._busy = True  # what is looked up here makes events, too
        try:
            if event in _CHANGES:
                paths = [_absolute(arguments[path], arguments[at] if at else -1) for path, at in _CHANGES[event]]
                self._changed(event.removeprefix("os."), paths, None)
            elif event == NATIVE or (arguments[2] or 0) & WRITING:
                path = _absolute(arguments[0], -1)
                self._changed("write", [path], lambda: _leave_open(path, arguments[2] if event == "open" else None))
        finally:
            self._busy = False

    def _changed(self, what: str, paths: list[str], leave_open: Callable[[], None] | None) -> None:
        inside = [path for path in paths if f"{path}/".startswith(f"{self._folder}/")]
        if not inside:
            return
        self.seen.append((f"{what} {os.path.relpath(inside[-1], self._folder)}", leave_open is not None))
        if len(self.seen) == self._last:
            if self._opened and leave_open is not None:
                leave_open()
            os._exit(KILLED)


def _absolute(path: Any, folder: int) -> str:
    if not isinstance(path, (str, bytes, os.PathLike)):  # an open descriptor
        return ""
    start = os.readlink(f"/proc/self/fd/{folder}") if folder not in (-1, None) else os.getcwd()  # noqa: PTH109, PTH115
    return os.path.normpath(os.path.join(start, os.fsdecode(path)))  # noqa: PTH118 -- a link's own name


def _leave_open(path: str, flags: int | None) -> None:
    """Leave the file as it is just after it was opened; one that Rust or C++ writes (None) as one that is cut."""
    if flags is not None:
        os.open(path, flags, 0o600)
    else:
        Path(path).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")


def announce_native_writes() -> None:
    """Let the writers that Python's hooks do not see say where they are about to write."""
    import safetensors.torch
    import torch
    from transformers import PreTrainedTokenizerFast

    def announced(write: Callable[..., Any], file: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            path = file(*arguments, **keywords)
            if isinstance(path, (str, os.PathLike)):
                sys.audit(NATIVE, path)
            return write(*arguments, **keywords)

        return call

    safetensors.torch.serialize_file = announced(safetensors.torch.serialize_file, lambda tensors, path, **_: path)
    torch.save = announced(torch.save, lambda value, path, **_: path)
    saved = PreTrainedTokenizerFast._save_pretrained
    PreTrainedTokenizerFast._save_pretrained = announced(  # type: ignore[method-assign]
        saved, lambda *_, save_directory, **__: Path(save_directory) / "tokenizer.json"
    )
