"""Liger's kernels, some of which write over the outputs of layers without torch's knowledge: the rotary embedding over
queries and keys, the backward pass of a gate over its two inputs, the cross entropy over logits.

The gradient of a magnitude is read from a layer's output. So torch is told of each such write, as it asks kernels to
tell (``torch.autograd.graph.increment_version``), and a layer whose output is not what it was computes its product
again (``trimtab.ops.frozen_linear``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trimtab.integrations.on_import import on_import

WRITERS = {
    "liger_kernel.ops.rope": ("rope_forward", 2),
    "liger_kernel.ops.qwen2vl_mrope": ("qwen2vl_mrope_forward", 2),
    "liger_kernel.ops.swiglu": ("swiglu_backward", 2),
    "liger_kernel.ops.geglu": ("geglu_backward", 2),
    "liger_kernel.ops.cross_entropy": ("cross_entropy_forward", 1),
}
"""Module -> the function that writes, and over how many of its first arguments."""


def teach_when_imported() -> None:
    """Have Liger's functions tell torch what they write over, now or when they are imported."""
    for name in WRITERS:
        on_import(name, teach)


def teach(module: ModuleType) -> None:
    """Wrap the function of ``module`` that writes, unless it is, or this release has none of that name."""
    name, count = WRITERS[module.__name__]
    function = getattr(module, name, None)
    if function is not None and not hasattr(function, "trimtab_wraps"):
        setattr(module, name, _telling(function, count))


def _telling(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def writes(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not torch.compiler.is_compiling():  # a compiler sees by itself what a kernel writes
            for tensor in args[:count]:
                if isinstance(tensor, Tensor) and not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        return result

    writes.trimtab_wraps = function  # type: ignore[attr-defined]
    return writes
