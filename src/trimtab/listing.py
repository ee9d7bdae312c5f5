"""Folders in which each file defines one class of a kind, and is found by being there."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

Kind = TypeVar("Kind")


def names(folder: Iterable[str]) -> list[str]:
    """The names of the files of a package's folder (its ``__path__``), sorted, without those that begin with ``_``."""
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def class_in(package: str, name: str, kind: type[Kind]) -> type[Kind]:
    """The one class of ``kind`` that the file ``name`` of ``package`` defines."""
    module = importlib.import_module(f"{package}.{name}")
    here = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    defined = [value for value in here if issubclass(value, kind)]
    if len(defined) != 1:
        raise TypeError(f"{module.__name__}: expected one {kind.__name__}, the file defines {len(defined)}")
    return defined[0]
