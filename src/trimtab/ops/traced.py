"""Whether somebody looks on who needs to see torch's own operations and no function of ours."""

from __future__ import annotations

import torch


def seen_through() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``, ...) or ``torch.jit.trace`` is at work. A
    compiler sees our functions as they are."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._is_tracing()
