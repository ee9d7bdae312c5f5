"""Packages whose files each define one class of the same kind. Adding a file adds the class; nothing registers it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

Kind = TypeVar("Kind")


def names(folder: Iterable[str]) -> list[str]:
    """The sorted names of a package's files, given its ``__path__``; names that begin with ``_`` are left out."""
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def names_of(package: str) -> list[str]:
    """As ``names``, of a package of this library that is not to be imported."""
    return names([str(Path(__file__).with_name(package))])


def class_in(package: str, name: str, kind: type[Kind]) -> type[Kind]:
    """The one class of ``kind`` that the file ``name`` of ``package`` defines."""
    module = importlib.import_module(f"{package}.{name}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, kind)]
    defined = [value for value in classes if value.__module__ == module.__name__]
    if len(defined) != 1:
        raise TypeError(f"{module.__name__}: expected one {kind.__name__}, the file defines {len(defined)}")
    return defined[0]
