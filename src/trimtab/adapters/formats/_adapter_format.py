"""The base class of the adapter formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar

from torch import nn

from trimtab.adapters.record import StoredAdapter
from trimtab.surgery.adapted import Adapted


class AdapterFormat(ABC):
    """One way to store an adapter in a folder, as two files."""

    files: ClassVar[tuple[str, str]]
    """The description and the tensors. A folder with such a description holds an adapter of this format."""
    label: ClassVar[str] = ""
    """Whose format it is, for messages; empty for our own."""
    preference: ClassVar[int]
    """Of the formats that can express a model's adapters, the one with the lowest number is used."""

    @abstractmethod
    def can_express(self, model: nn.Module, adapted: dict[str, Adapted]) -> bool:
        """Whether a reader of this format would compute exactly what these adapters compute."""

    @abstractmethod
    def save(self, model: nn.Module, adapted: dict[str, Adapted], folder: Path) -> None:
        """Write the two files into ``folder``, which exists."""

    @abstractmethod
    def load(self, folder: Path) -> dict[str, StoredAdapter]:
        """The stored adapter of each module. Raises AdapterError for files that are damaged or not supported."""

    def left_out(self, folder: Path, modules: Mapping[str, nn.Module], stored: Collection[str]) -> list[str]:
        """Those ``modules`` of a model that the description names beside those that are ``stored``."""
        return []
