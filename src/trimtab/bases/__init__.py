"""The kinds of frozen module. One file is one kind; a new file in this folder is found by itself.

Each file defines ``Base``, a handle on one module of that kind: of a weight, its dense value, its norms, how to write a
merged one back; of a block, how wide its hidden state is, and where that stands in a call. A kind that a dense layer
can be turned into has a function ``quantised`` besides. No other folder asks what kind of layer it holds.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import torch
from torch import nn

from trimtab.bases._base import Base, Kind
from trimtab.errors import ModelError

__all__ = ["Base", "Kind", "find", "names", "quantise"]

# The extra of this package with which each kind's own package is installed.
_EXTRAS = {"bitsandbytes": "quantised", "torchao": "torchao"}


@cache
def names(kind: Kind | None = None) -> list[str]:
    """The names of all bases, sorted; or of those of one kind."""
    return [name for name, base in _all().items() if kind in (None, base.kind)]


@cache
def _all() -> dict[str, type[Base]]:
    found = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}").Base for name in found}


def find(module: nn.Module, kind: Kind = "weight") -> Base | None:
    """A handle on ``module`` if some base of this kind knows it, else None."""
    for base in _all().values():
        if base.kind == kind and base.knows(module):
            return base(module)
    return None


@torch.no_grad()
def quantise(base: Base, kind: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A module of ``kind`` (``int8``, ``nf4``, ``torchao_int8``) with the weight of the dense ``base``, quantised from
    ``dtype`` (None: the base's), and its bias.

    Raises ModelError if the package that the kind needs is not installed.
    """
    make = importlib.import_module(f"{__name__}.{kind}").quantised
    bias, dtype = base.bias, dtype or base.dtype
    if bias is not None and bias.dtype != dtype:
        bias = nn.Parameter(bias.to(dtype), requires_grad=bias.requires_grad)
    try:
        return make(base.weight().detach(), bias, dtype)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS:
            raise
        raise ModelError(
            f"quantisation {kind}: needs {package}, which is not installed: pip install 'trimtab[{_EXTRAS[package]}]'"
        ) from None
