"""The kinds of frozen weight. One file is one kind; a new file in this folder is found by itself.

Each file defines ``Base``, a handle on one module of that kind: its dense weight, its norms, how to write a merged
weight back. No other folder asks what kind of layer it holds.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from trimtab.bases._base import Base

__all__ = ["Base", "find", "names"]


@cache
def names() -> list[str]:
    """The names of all kinds of base, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


@cache
def _kinds() -> list[type[Base]]:
    return [importlib.import_module(f"{__name__}.{name}").Base for name in names()]


def find(module: nn.Module) -> Base | None:
    """A handle on ``module`` if some base knows its kind, else None."""
    for kind in _kinds():
        if kind.knows(module):
            return kind(module)
    return None
