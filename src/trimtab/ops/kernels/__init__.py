"""The passes over ``[tokens, out]`` that an adapter adds to a frozen product, and which set of kernels does them.

``contract.py`` says what the passes are. ``plain.py`` does them by torch's operations, one after the other, on any
device, and ``channels.py`` where the channels come before the places, as they do behind a convolution. ``triton.py``
does them on a GPU, in one walk each. A faster set for one more kind of device is one more file, and one more line in
``kernels_for``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabWarning
from trimtab.ops.kernels import channels, plain
from trimtab.ops.kernels.contract import KernelSet

_TRITONS = ("cuda", "xpu")  # torch calls AMD's devices cuda, too

_forced: KernelSet | None = None
_works: dict[str, bool] = {}


def kernels_for(tensor: Tensor) -> KernelSet:
    """The kernels for ``tensor``, a product or its gradient: for its device, and how it is laid out. A set gives to
    the plain one by itself what it is not made for."""
    return _kernels_on(tensor.device) if tensor.dim() == 2 else channels


def _kernels_on(device: torch.device) -> KernelSet:
    if _forced is not None:
        return _forced
    if device.type in _TRITONS and _imports("triton"):
        from trimtab.ops.kernels import triton

        return triton
    return plain


def turning_for(rows: Tensor) -> Any:
    """The programs that turn and gather ``rows [tokens, in]`` for a square update; None where torch's operations do."""
    if rows.dim() != 2 or kernels_for(rows) is plain:
        return None
    from trimtab.ops.kernels import triton_square

    return triton_square


def segments_for(rows: Tensor) -> Any:
    """The programs that add many updates to the product of ``rows [tokens, in]``, each to rows of its own; None where
    one after the other does."""
    if rows.dim() != 2 or kernels_for(rows) is plain:
        return None
    from trimtab.ops.kernels import triton_segments

    return triton_segments


def dropping_for(x: Tensor) -> Any:
    """The programs that drop elements of ``x`` inside of products; None where torch's operations do."""
    if _kernels_on(x.device) is plain or not (x.dim() and x.is_floating_point()):
        return None
    from trimtab.ops.kernels import triton

    return dropping() if triton.takes(x) else None


def dropping() -> Any:
    """Those programs, by which what they have dropped is dropped again, whatever set is in use by then."""
    return import_module(f"{__name__}.triton_dropout")


def quotients_for(norm: Tensor) -> Any:
    """The program that divides magnitudes by ``norm``; None where torch's operations do."""
    if (norm.device.type not in _TRITONS and _forced is None) or torch.compiler.is_compiling():
        return None  # (a compiler makes one program of them)
    if kernels_for(norm.view(1, -1)) is plain:
        return None
    from trimtab.ops.kernels import triton

    return triton.quotients


@contextmanager
def using(name: str) -> Iterator[KernelSet]:
    """A context in which matrices on any device get the set ``name``: for comparing sets, and for tests.

    Raises:
        ValueError: there is no such set.
        RuntimeError: what the set needs does not work here.
    """
    global _forced
    if name not in ("plain", "triton"):
        raise ValueError(f"there is no set of kernels called {name!r}: use 'plain' or 'triton'")
    if not _imports(name):
        raise RuntimeError(f"the set of kernels {name!r} does not work here: install a triton that fits this torch")
    before, _forced = _forced, import_module(f"{__name__}.{name}")
    try:
        yield _forced
    finally:
        _forced = before


def _imports(name: str) -> bool:
    """Whether the set ``name`` can be imported. Where it cannot, although the device wants it, that is told once."""
    if name not in _works:
        try:
            import_module(f"{__name__}.{name}")
            _works[name] = True
        except Exception as error:  # whatever a package does that was built for another torch
            _works[name] = False
            warnings.warn(
                f"the fused kernels are left out, and layers take longer: {name} cannot be used here "
                f"({type(error).__name__}: {error}). Install the triton that belongs to this torch",
                TrimtabWarning,
                stacklevel=2,
            )
    return _works[name]


# What torch.compiler.assume_constant_result does, which would load all of torch's compiler for it: seconds, in every
# process.
setattr(_imports, "_dynamo_marked_constant", True)  # noqa: B010
