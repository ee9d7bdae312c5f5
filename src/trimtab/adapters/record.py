"""The adapter of one module as every format reads it, and the name of a module on disk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.methods import Options


@dataclass(frozen=True)
class StoredAdapter:
    """The adapter of one module."""

    method: str
    options: Options
    tensors: dict[str, Tensor]
    shape: tuple[int, ...] | None = None
    """``(out, in)`` of the weight that the adapter was made for, if the format stores it."""
    base: Tensor | None = None
    """That weight itself, if the format stores it."""


def name_on_disk(name: str) -> str:
    """The name of a module as it was before ``torch.compile`` wrapped it or a block around it."""
    return name.replace("_orig_mod.", "")
