"""The state that a model is in while it is measured, and its way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trimtab.surgery.serving import serving


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and nothing trains; on the way out every module gets the mode back that it had.

    Each module is remembered by itself, since a frozen part may be in eval mode inside a training model. This is
    ``no_grad`` and not ``inference_mode``: a tensor that a module caches now must still serve a training step later.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), serving(model):
            yield
    finally:
        for module, training in before:
            module.training = training
