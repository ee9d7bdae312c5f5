"""Whether somebody looks on who needs to see torch's own operations and no function of ours."""

from __future__ import annotations

import torch


def seen_through() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``, ...) or ``torch.jit.trace`` is at work. A
    compiler sees our functions as they are."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None
