"""Opens a file of rows, compressed or not, and bounds what is taken from it.

A row has at most ``ROW`` bytes, and a small file may not unfold to a large one: what is read is counted on the way, so
that a hostile file costs a message and not the memory. Fifos, devices and sockets are never opened, since they may
never end.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from trimtab.errors import DataError

ROW = 16 * 2**20
"""Most bytes of a row: some four million tokens, more than any model reads."""

UNFOLDED, RATIO = 64 * 2**20, 200
"""A file unfolds to at most so many bytes, or so many times its own size where that is more. Text shrinks to a third
or a tenth; a bomb of zeros to a thousandth and less."""

LINE = 64
"""What a line counts for besides its bytes, since many empty ones take time, too."""


def _zstd(path: Path) -> Any:
    import pyarrow  # it is there with `datasets`, and reads zstd without a package of its own

    return pyarrow.input_stream(str(path), compression="zstd")


COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
"""How a file with such a last ending is opened."""


def endings(path: Path | str) -> tuple[str, str]:
    """What the rows are written in, and how the file is compressed: ``("jsonl", ...)`` as ``(".jsonl", ".gz")``."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    return suffixes[-1] if suffixes else "", packed


def is_table(path: Path | str, *others: str) -> bool:
    """Whether a file's name says that rows are all it can hold. JSON may be anything, and text, too: these count only
    where they are among the ``others``."""
    return endings(path)[0] in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", *others)


def require_file(source: str, path: Path) -> None:
    """Raise DataError if ``path`` is a fifo, a device or a socket, from which a read may never return."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = [(stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")]
        kind = next((name for test, name in kinds if test(mode)), "no file")
        raise DataError(f"{source} is {kind}; rows are read more than once, so write them to a file and name that.")


class Budget:
    """Counts what a file unfolds to."""

    def __init__(self, source: str, path: Path, *, free: int = UNFOLDED) -> None:
        self._source, self._most, self._taken = source, max(free, RATIO * path.stat().st_size), 0

    def take(self, size: int) -> None:
        """Count ``size`` bytes more. Raises DataError once they are too many."""
        self._taken += size
        if self._taken > self._most:
            raise DataError(
                f"{self._source} unfolds to more than {self._most / 2**20:,.0f} MiB, over {RATIO} times its own size, "
                "as only a damaged or hostile file does. If it is meant so, unpack it yourself and name what comes out."
            )


class _Counted(io.RawIOBase):
    """A stream that counts what is read from it."""

    def __init__(self, stream: BinaryIO, budget: Budget) -> None:
        self._stream, self._budget = stream, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = cast(io.BufferedIOBase, self._stream).readinto(buffer)
        self._budget.take(size)
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def opened(source: str, path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of the file, unpacked. Raises DataError if it unfolds too far, or if it cannot be unpacked."""
    opener = COMPRESSED.get(endings(path)[1])
    if opener is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        with io.BufferedReader(_Counted(opener(path), Budget(source, path)), 2**20) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{source} cannot be unpacked ({error}): it is cut, damaged, or of another kind than its ending says; "
            "make it anew."
        ) from error


def numbered_lines(source: str, path: Path, *, blank: bool = True) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their ends, and their numbers from 1; without ``blank`` ones where not asked."""
    packed = bool(endings(path)[1])
    budget = Budget(source, path)
    with opened(source, path) as stream:
        number = 0
        while raw := stream.readline(ROW + 1):
            number += 1
            if packed:
                budget.take(LINE + len(raw))
            if len(raw) > ROW:
                raise DataError(f"{source}, line {number}: {too_long()}")
            if blank or not (len(raw) < 3 and raw.isspace()):
                yield number, decoded(source, raw, number)


def whole_text(source: str, path: Path) -> str:
    """All of a text file."""
    with opened(source, path) as stream:
        return decoded(source, stream.read())


def decoded(source: str, raw: bytes, line: int = 1) -> str:
    """``raw`` as UTF-8 text without a byte-order mark; its first line has the number ``line``."""
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        number = line + error.object.count(b"\n", 0, error.start)
        wide = (line == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:100]
        kind = "; it looks like UTF-16" if wide else ""
        raise DataError(
            f"{source}, line {number}: expected UTF-8 text, but came the byte 0x{error.object[error.start]:02x}{kind}; "
            "save the file as UTF-8."
        ) from error
    if (at := text.find("\0")) >= 0:
        number = line + text.count("\n", 0, at)
        raise DataError(
            f"{source}, line {number}: expected text, but came a NUL byte; the file is binary, damaged, or UTF-16. "
            "Save it as UTF-8."
        )
    return text


def too_long() -> str:
    """What is said of a row that is longer than any model could read."""
    return f"a row of more than {ROW // 2**20} MiB, which no model can read; cut it into rows."
