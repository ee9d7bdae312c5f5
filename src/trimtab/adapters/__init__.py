"""Adapters on disk. ``store`` saves and loads them, ``formats/`` has a file for each format, and ``safe_read`` reads
files that others wrote.

``trimtab.adapters(model)`` lists the names of the adapters that a model carries. A package and a function cannot both
have that name, so the package can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType

from torch import nn


class _Package(ModuleType):
    def __call__(self, model: nn.Module) -> list[str]:
        """The names of the adapters that ``model`` carries, in the order in which they came; empty if there are
        none."""
        from trimtab.surgery.names import adapters

        return adapters(model)


sys.modules[__name__].__class__ = _Package
