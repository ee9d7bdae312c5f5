"""Tokenised rows end to end in a few flat tensors, and the safetensors file that keeps them between runs.

The file holds the tensors of ``FlatRows``; its metadata hold ``dropped`` (JSON) and ``digest``, a sha256 of all of it.
A file whose digest is another is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trimtab.data.rows import Example
from trimtab.files import write_atomically

VERSION = 1
"""Part of every key; raised whenever the same rows would be encoded in another way."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlatRows:
    """Rows as the cache holds them.

    Attributes:
        ids: int32 ``[tokens]``, all rows end to end.
        trained: bool ``[tokens]``: whether the token carries loss.
        lengths: int64 ``[rows]``.
        kept: int64 ``[rows]``, the index of each row's example.
        cut: bool ``[rows]``: whether the row lost tokens to the limit of length.
        dropped: index of the example and the reason, for each that has no row.
    """

    ids: torch.Tensor
    trained: torch.Tensor
    lengths: torch.Tensor
    kept: torch.Tensor
    cut: torch.Tensor
    dropped: list[tuple[int, str]]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The five tensors by name."""
        return {name: getattr(self, name) for name in ("ids", "trained", "lengths", "kept", "cut")}

    def digest(self) -> str:
        """A sha256 of everything in here."""
        digest = hashlib.sha256(json.dumps(self.dropped).encode())
        for tensor in self.tensors.values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def cache_file(folder: Path, examples: Iterable[Example], tokenizer: Any, max_length: int | None) -> Path:
    """The file for these rows: named by all that their encoding depends on, which is not where a row comes from."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Whoever called the tokenizer last left its padding and truncation in there; encoding uses neither.
    content.pop("padding", None)
    content.pop("truncation", None)
    digest = hashlib.sha256(json.dumps([VERSION, content, tokenizer.eos_token_id, max_length]).encode())
    for example in examples:
        digest.update(json.dumps([example.text, example.trained, example.answer is None, example.ends]).encode())
    return folder / f"{digest.hexdigest()}.safetensors"


def save(rows: FlatRows, path: Path) -> None:
    """Keep rows. A disk that refuses is worth a warning and no more: the rows are there, and this is a shortcut."""
    metadata = {"dropped": json.dumps(rows.dropped), "digest": rows.digest()}
    try:
        write_atomically(path, lambda temporary: save_file(rows.tensors, temporary, metadata=metadata))
    except (OSError, SafetensorError) as error:
        log.warning("The tokenised rows could not be kept in %s (%s); the next run tokenises them again.", path, error)


def load(path: Path) -> FlatRows | None:
    """What ``save`` wrote, or None if there is no such file or it is not as it was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        rows = FlatRows(**tensors, dropped=_dropped(json.loads(metadata["dropped"])))
        if metadata["digest"] == rows.digest():
            return rows
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass
    log.warning("The file %s is damaged; the rows are tokenised again.", path)
    return None


def _dropped(pairs: Sequence[Sequence[Any]]) -> list[tuple[int, str]]:
    return [(int(index), str(reason)) for index, reason in pairs]
