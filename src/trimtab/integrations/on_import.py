"""Something done to a module of another library as soon as that is imported, and not before: importing it here would
take seconds, for a library that may never be asked for."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def on_import(name: str, teach: Callable[[ModuleType], None]) -> None:
    """Call ``teach`` with the module ``name``: now if it is imported, else right after it is. Once for each."""
    if name in sys.modules:
        teach(sys.modules[name])
    elif not any(isinstance(finder, _Teacher) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Teacher(name, teach))


class _Teacher(importlib.abc.MetaPathFinder):
    """Finds nothing itself, but lets ``teach`` follow the import of ``name``."""

    def __init__(self, name: str, teach: Callable[[ModuleType], None]) -> None:
        self.name, self._teach = name, teach

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_teach(module: ModuleType) -> None:
                execute(module)
                self._teach(module)

            spec.loader.exec_module = execute_and_teach  # type: ignore[method-assign]
        return spec
