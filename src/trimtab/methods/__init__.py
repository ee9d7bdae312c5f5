"""The methods. One file is one method, and the file's name is the method's name in a configuration.

A method file defines ``Options`` (a frozen pydantic model with documented fields) and ``Method`` (an ``nn.Module``).
Putting such a file into this folder is all it takes: the names below are read from the folder, and so is the contract
suite.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from trimtab.bases import Kind
from trimtab.errors import PlanError, did_you_mean
from trimtab.methods._base import Method, Options

__all__ = ["Method", "Options", "method_class", "names", "options_class"]


@cache
def names(sits_on: Kind | None = None) -> list[str]:
    """The names of all methods, sorted; or of those that sit on one kind of base."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [name for name in found if sits_on is None or method_class(name).sits_on == sits_on]


def _file(name: str) -> object:
    if name not in names():
        raise PlanError(f"unknown method '{name}': expected one of {', '.join(names())}.{did_you_mean(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def options_class(name: str) -> type[Options]:
    """The options of the method called ``name``. Raises PlanError for an unknown name."""
    return _file(name).Options  # type: ignore[attr-defined]


def method_class(name: str) -> type[Method]:
    """The module class of the method called ``name``. Raises PlanError for an unknown name."""
    return _file(name).Method  # type: ignore[attr-defined]
