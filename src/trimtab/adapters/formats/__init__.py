"""The formats of an adapter on disk. One file is one format; a new file in this folder is found by itself.

Each file is a module with the members of ``AdapterFormat``. No other file names a format.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

from trimtab.adapters.record import StoredAdapter
from trimtab.surgery.adapted import Adapted


@runtime_checkable
class AdapterFormat(Protocol):
    """What a format's file defines."""

    FILES: tuple[str, str]
    """The description and the tensors. A folder that holds the description holds an adapter of this format."""
    LABEL: str
    """Whose format it is, for messages; empty for our own."""
    PREFERENCE: int
    """A model is saved in the format of the lowest number that can express its adapters."""

    def can_express(self, model: nn.Module, adapted: dict[str, Adapted]) -> bool:
        """Whether a reader of this format would compute exactly what these adapters compute."""
        ...

    def save(self, model: nn.Module, adapted: dict[str, Adapted], folder: Path) -> None:
        """Write the two files into ``folder``."""
        ...

    def load(self, folder: Path) -> dict[str, StoredAdapter]:
        """What is stored of each module. Raises AdapterError for files that are damaged or not supported."""
        ...


@cache
def all_formats() -> tuple[AdapterFormat, ...]:
    """Every format, the preferred one first."""
    listed = []
    for file in pkgutil.iter_modules(__path__):
        if not file.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{file.name}")
            if not isinstance(module, AdapterFormat):
                raise TypeError(f"{module.__name__}: lacks a member of AdapterFormat")
            listed.append(module)
    return tuple(sorted(listed, key=lambda one: one.PREFERENCE))
