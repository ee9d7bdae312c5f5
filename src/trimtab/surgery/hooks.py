"""Hooks that others put onto a frozen layer, and how they run around what its adapter computes.

PyTorch's hooks lie in tables of the module, accelerate's (offloading) in a forward function of its own. Both run when
the module is called; so the layer is called, with the adapter's computation in place of its forward for that moment.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
_under_way: dict[int, list[Any]] = {}  # id of a module -> how many of its calls, and its own forward function


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward function."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
    )


def call_with_hooks(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``module(*args, **kwargs)`` as if ``forward`` were its forward function. Several threads may call one module at
    once, with forward functions that are equal."""
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    _put(module, name, forward)
    try:
        return module(*args, **kwargs)
    finally:
        _put_back(module, name)


def _put(module: nn.Module, name: str, forward: Callable[..., Any]) -> None:
    with _lock if not torch.compiler.is_compiling() else nullcontext():
        calls = _under_way.setdefault(id(module), [0, module.__dict__.get(name)])
        calls[0] += 1
        setattr(module, name, forward)


def _put_back(module: nn.Module, name: str) -> None:
    with _lock if not torch.compiler.is_compiling() else nullcontext():
        calls = _under_way[id(module)]
        calls[0] -= 1
        if calls[0]:
            return
        del _under_way[id(module)]
        if calls[1] is None:
            del module.__dict__[name]
        else:
            setattr(module, name, calls[1])
