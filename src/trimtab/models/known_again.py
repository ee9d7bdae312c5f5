"""By which the files of a model, or of an adapter, are known again, without reading all of them.

An adapter belongs to the weights beside which it was trained. Others of the same shapes take it without a word, such as
those of a merged model that was written anew into the same folder.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from trimtab.models.locate import Source

WHOLE, SAMPLES, SAMPLE = 16 * 2**20, 1024, 4096
"""A file of at most so many bytes is read whole; of a larger one so many samples of so many bytes, spread evenly: every
weight of any size is met by some."""

_KINDS = (".safetensors", ".bin", ".gguf")


def model_digest(source: Source) -> str | None:
    """The SHA-256 of what is looked at of the model's weights and tokenizer, whatever their files are called; None for
    a model of the hub, whose revision says what it is, and where the files cannot be read."""
    if source.kind == "hub":
        return None
    place = Path(source.location)
    try:
        if place.is_file():
            files = [place]
        else:
            files = sorted(file for file in place.iterdir() if file.suffix in _KINDS or file.name == "tokenizer.json")
        digests = [bytes.fromhex(mark(file)) for file in files]
    except OSError:
        return None
    return hashlib.sha256(b"".join(digests)).hexdigest()


def mark(file: Path) -> str:
    """By which the content of a file is known: of a large one, by parts of it all over, since weights that differ do so
    everywhere."""
    stat = file.stat()
    return _digest(file, stat.st_size, stat.st_mtime_ns).hex()


@lru_cache(maxsize=10_000)
def _digest(file: Path, size: int, modified: int) -> bytes:
    """Of one file, which is another once it is written anew (``modified``)."""
    found = hashlib.sha256()
    found.update(str(size).encode())
    with file.open("rb") as content:
        if size <= WHOLE:
            found.update(content.read())
        else:
            for number in range(SAMPLES):
                content.seek(number * (size - SAMPLE) // (SAMPLES - 1))
                found.update(content.read(SAMPLE))
    return found.digest()
