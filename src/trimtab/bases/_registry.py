"""Which kinds of frozen module there are, read from the folder, and which of them a module is."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from functools import cache
from typing import Literal, overload

import torch
from torch import nn

from trimtab import listing
from trimtab.bases._base import Base, BlockBase, Kind, ModuleBase, WeightBase
from trimtab.bases._held import HeldWeight
from trimtab.bases._quantised import QuantisedBase
from trimtab.errors import ModelError, did_you_mean

_PACKAGE = __name__.rpartition(".")[0]


@cache
def names(kind: Kind | None = None) -> list[str]:
    """The names of all bases, sorted; or of those of one kind."""
    return sorted(name for name, base in _all().items() if kind in (None, base.kind))


@cache
def quantised_names() -> list[str]:
    """The names of the bases that a dense layer can be turned into, sorted: what ``quantisation:`` may say."""
    return [name for name, base in _all().items() if issubclass(base, QuantisedBase)]


@cache
def peft_names() -> dict[str, str]:
    """PEFT's name of a trained tensor -> ours, over all kinds of layers."""
    kinds = [base for base in _all().values() if issubclass(base, WeightBase)]
    return {theirs: own for base in kinds for own, theirs in base.peft_names.items()}


def quantised_by_size() -> list[str]:
    """One quantised kind for each number of bits, the first by name, from the most bits to the fewest."""
    kinds = {quantised_base(name).bits: name for name in reversed(quantised_names())}
    return [kinds[bits] for bits in sorted(kinds, reverse=True)]


def quantised_base(name: str) -> type[QuantisedBase]:
    """The class of the quantised base called ``name``. Raises ModelError for an unknown name."""
    base = _all().get(name)
    if base is None or not issubclass(base, QuantisedBase):
        known = quantised_names()
        raise ModelError(f"quantisation '{name}': expected one of {', '.join(known)}.{did_you_mean(name, known)}")
    return base


@cache
def _all() -> dict[str, type[Base]]:
    folder = importlib.import_module(_PACKAGE).__path__
    found = {name: listing.class_in(_PACKAGE, name, Base) for name in listing.names(folder)}
    return dict(sorted(found.items(), key=lambda pair: pair[1].is_fallback))


@overload
def find(module: nn.Module, kind: Literal["weight"] = "weight") -> WeightBase | None: ...
@overload
def find(module: nn.Module, kind: Literal["block"]) -> BlockBase | None: ...
@overload
def find(module: nn.Module, kind: Literal["module"]) -> ModuleBase | WeightBase | None: ...
@overload
def find(module: nn.Module, kind: Kind) -> Base | None: ...
def find(module: nn.Module, kind: Kind = "weight") -> Base | None:
    """A handle on ``module`` if some base of this kind knows it, else None. A linear layer is found as one where any
    module is asked for."""
    if kind == "module" and (layer := find(module)) is not None and layer.is_linear:
        return layer
    for base in _all().values():
        if base.kind == kind and base.knows(module):
            return base(module)
    return None


def named(module: nn.Module) -> str:
    """The class of ``module``; with the reason where a base might be expected to know it, and none does."""
    name = type(module).__name__
    if find(module) is not None:
        return name
    reason = next((reason for base in _all().values() if (reason := base.refuses(module))), "")
    return f"{name} ({reason})" if reason else name


def held_weights(module: nn.Module) -> Iterator[HeldWeight]:
    """The weights that hang directly on ``module`` as parameters, each as a module that ``find`` takes."""
    if not module._parameters:
        return
    taken: set[str] = set()
    for base in _all().values():
        new = [attribute for attribute in base.holds(module) if attribute not in taken]
        if new and not (base.is_fallback and find(module) is not None):
            taken.update(new)
            yield from (HeldWeight(module, attribute) for attribute in new)


def parts(module: nn.Module) -> list[nn.Module]:
    """The children of ``module`` that a glob over its name selects, together with the weights that hang on it."""
    names = [name for base in _all().values() for name in base.parts(module)]
    return [child for name in names if (child := module._modules.get(name)) is not None]


@torch.no_grad()
def quantise(
    base: WeightBase, kind: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """A module of ``kind`` (one of ``quantised_names``) with the weight of the dense ``base``, quantised from ``dtype``
    (None: the base's), and its bias, on ``device`` (None: the base's).

    Raises ModelError if there is no such kind, or if the package that it needs is not installed.
    """
    made = quantised_base(kind)
    bias, dtype = base.bias, dtype or base.dtype
    device = device or base.device
    if bias is not None and (bias.dtype != dtype or bias.device != torch.device(device)):
        bias = nn.Parameter(bias.to(device, dtype), requires_grad=bias.requires_grad)
    logging.getLogger(made.package).setLevel(logging.ERROR)  # they tell of optional kernels that are not installed
    try:
        return made.quantised(base.weight().detach().to(device), bias, dtype)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != made.package:
            raise
        raise ModelError(
            f"quantisation {kind}: needs {made.package}, which is not installed: pip install 'trimtab[{made.extra}]'"
        ) from None
