"""What is printed reaches any terminal, pipe or file, and nothing that is done depends on it.

A terminal of another encoding gets plain letters for our own signs and escapes such as ``\\u05e9`` for the rest. Where
nobody reads any more (``| head``), or the disk that stdout goes to is full, what follows is dropped: a run that has
trained for an hour does not end because of a line about it. Where the answers themselves are lost, as on a full disk,
`lost_output` says so in the end.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

_PLAIN = {
    **{"✓": "+", "✗": "x", "±": "+-", "−": "-", "–": "-", "—": "-", "…": "...", "×": "x", "·": ".", "•": "*"},
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "\u00a0": " "},
    **dict.fromkeys("─━═╌╍╴╶╸╺", "-"),
    **dict.fromkeys("│┃║╎╏", "|"),
    **dict.fromkeys("█▇▆▅▄▃▂▁▪", "#"),
}


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = (_PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode("ascii") for letter in letters)
    return "".join(plain), error.end


codecs.register_error("trimtab.plainly", _plainly)


class _Forgiving(io.RawIOBase):
    """Writes to ``raw``, and after the first write that fails to nowhere."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw.isatty()

    def fileno(self) -> int:
        return self._raw.fileno()

    def write(self, data: Any) -> int | None:
        if self.lost is None:
            try:
                return self._raw.write(data)
            except OSError as error:
                self.lost = error
        return len(data)


def nobody_reads() -> bool:
    """Whether what is printed to stdout goes nowhere any more."""
    return _lost() is not None


def lost_output() -> OSError | None:
    """Why not all that was printed to stdout is there; None where all is, or where its reader went away."""
    if sys.stdout is not None:
        sys.stdout.flush()
    error = _lost()
    gone = error is not None and (error.errno == errno.EPIPE or (error.errno == errno.EIO and sys.stdout.isatty()))
    return None if gone else error


def _lost() -> OSError | None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Forgiving) else None


def make_safe() -> None:
    """Let no text, and no reader that goes away, end what this process does. A stream that was closed before it began
    leads nowhere, so that no file that is opened later takes its place, and what a library prints with it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
                setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue  # not a stream of the system's: a test's, a notebook's
        raw = getattr(stream.buffer, "raw", stream.buffer)
        if isinstance(raw, _Forgiving):
            continue
        if not isinstance(raw, io.RawIOBase):
            stream.reconfigure(errors="trimtab.plainly")
            continue
        stream.flush()
        safe = io.TextIOWrapper(
            io.BufferedWriter(_Forgiving(raw)),
            encoding=stream.encoding,
            errors="trimtab.plainly",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        _KEPT.append(stream)  # were it collected, it would close what is written to
        setattr(sys, name, safe)


_KEPT: list[io.TextIOBase] = []
