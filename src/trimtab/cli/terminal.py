"""What is printed reaches any terminal, pipe or file, and nothing that is done depends on it.

A terminal of another encoding gets plain letters for our own signs and escapes such as ``\\u05e9`` for the rest. Where
nobody reads any more (``| head``), or the disk that stdout goes to is full, what follows is dropped without a word: a
run that has trained for an hour does not end because of a line about it.
"""

from __future__ import annotations

import codecs
import io
import sys
from typing import Any

_PLAIN = {
    **{"✓": "+", "✗": "x", "±": "+-", "−": "-", "–": "-", "—": "-", "…": "...", "×": "x", "·": ".", "•": "*"},
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "\u00a0": " "},
    **dict.fromkeys("─━═╌╍╴╶╸╺", "-"),
    **dict.fromkeys("│┃║╎╏", "|"),
    **dict.fromkeys("█▇▆▅▄▃▂▁", "#"),
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
        self.lost = False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw.isatty()

    def fileno(self) -> int:
        return self._raw.fileno()

    def write(self, data: Any) -> int | None:
        if not self.lost:
            try:
                return self._raw.write(data)
            except OSError:
                self.lost = True
        return len(data)


def nobody_reads() -> bool:
    """Whether what is printed to stdout goes nowhere any more."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", None)
    return isinstance(raw, _Forgiving) and raw.lost


def make_safe() -> None:
    """Let no text, and no reader that goes away, end what this process does."""
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
