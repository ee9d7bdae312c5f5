"""The safetensors file that keeps tokenised rows between runs.

It holds the tensors of `trimtab.data.tokens.EncodedRows`. Its metadata hold ``dropped``, the rows that were left out,
as JSON, and ``digest``, the SHA-256 of both. A file whose digest does not match is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from trimtab.files import write_atomically, write_tensors

Tensors = dict[str, torch.Tensor]
Dropped = list[tuple[int, str]]
"""Index of the example, and the reason, for each that has no row."""

NAMES = ("ids", "trained", "lengths", "kept", "cut")
"""The tensors of the file, in the order in which they enter its digest."""

log = logging.getLogger(__name__)


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


def keep(path: Path, tensors: Tensors, dropped: Dropped) -> None:
    """Write the file. If that fails, a warning is logged."""
    metadata = {"dropped": json.dumps(dropped), "digest": _digest(tensors, dropped)}
    try:
        write_atomically(path, lambda temporary: write_tensors(temporary, tensors, metadata))
    except (OSError, SafetensorError) as error:
        log.warning("The tokenised rows could not be kept in %s (%s); the next run tokenises them again.", path, error)


def _digest(tensors: Tensors, dropped: Dropped) -> str:
    digest = hashlib.sha256(json.dumps(dropped).encode())
    for tensor in tensors.values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
