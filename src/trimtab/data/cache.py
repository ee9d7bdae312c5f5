"""The safetensors file that keeps tokenised rows between runs.

It holds the tensors of `trimtab.data.tokens.EncodedRows`. Its metadata hold ``dropped``, the rows that were left out,
as JSON, and ``digest``, the SHA-256 of both. A file whose digest does not match is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trimtab.data.rows import Example
from trimtab.data.tokens import Dropped, EncodedRows, Tensors, encode_flat, require_fast
from trimtab.files import write_atomically

VERSION = 1
"""Part of every file's name; raise it when the same rows would be encoded differently."""

NAMES = ("ids", "trained", "lengths", "kept", "cut")
"""The tensors of the file, in the order in which they enter its digest."""

log = logging.getLogger(__name__)


def encode_once(examples: Sequence[Example], tokenizer: Any, max_length: int | None, folder: Path) -> EncodedRows:
    """Encode rows as `trimtab.data.tokens.encode_all` does, and keep the result in ``folder`` for the next run.

    Rows are found again by everything that their encoding depends on (`cache_file`). A damaged file is made anew. If
    the file cannot be written, a warning is logged and the rows are used all the same.
    """
    require_fast(tokenizer)
    path = cache_file(folder, examples, tokenizer, max_length)
    kept = load(path)
    if kept is not None:
        return EncodedRows(*kept, examples)
    tensors, dropped = encode_flat(examples, tokenizer, max_length)
    metadata = {"dropped": json.dumps(dropped), "digest": _digest(tensors, dropped)}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except (OSError, SafetensorError) as error:
        log.warning("The tokenised rows could not be kept in %s (%s); the next run tokenises them again.", path, error)
    return EncodedRows(tensors, dropped, examples)


def load(path: Path) -> tuple[Tensors, Dropped] | None:
    """The content of the file, or None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        tensors = {name: stored[name] for name in NAMES}
        dropped = [(int(index), str(reason)) for index, reason in json.loads(metadata["dropped"])]
        if metadata["digest"] == _digest(tensors, dropped):
            return tensors, dropped
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass
    log.warning("The file %s is damaged; the rows are tokenised again.", path)
    return None


def _digest(tensors: Tensors, dropped: Dropped) -> str:
    digest = hashlib.sha256(json.dumps(dropped).encode())
    for tensor in tensors.values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def cache_file(folder: Path, examples: Iterable[Example], tokenizer: Any, max_length: int | None) -> Path:
    """The file for these rows. Its name is a digest of everything that their encoding depends on."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation are those of the tokenizer's last call, and encoding uses neither.
    content.pop("padding", None)
    content.pop("truncation", None)
    digest = hashlib.sha256(json.dumps([VERSION, content, tokenizer.eos_token_id, max_length]).encode())
    for example in examples:
        digest.update(json.dumps([example.text, example.trained, example.answer is None, example.ends]).encode())
    return folder / f"{digest.hexdigest()}.safetensors"
