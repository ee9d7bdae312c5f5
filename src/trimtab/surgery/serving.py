"""What a model can be spared while it answers or is measured, when nothing trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trimtab.surgery.adapted import adapted_modules


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """A context in which the caller promises that no trained tensor of ``model`` changes.

    Without gradients, an adapter with a magnitude keeps its norm (one number per output) from one pass to the next, and
    each time compares its trained tensors with a copy, so that it never uses an old norm. In this context it need not
    compare. For passes of a few tokens it also prepares once what there is to compute, which makes a model that writes
    one token at a time faster. If values change in here all the same, the old norm is used until the context ends.

    ``trimtab evaluate`` and ``trimtab generate`` use it. Contexts may be nested.
    """
    adapters = [adapted.adapter for _, adapted in adapted_modules(model)]
    for adapter in adapters:
        adapter.hold()
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.release()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients, inside ``serving``. Afterwards every module is in the mode that it had before.

    The modes are kept for each module, since a frozen part may be in eval mode inside a training model. This is
    ``no_grad`` and not ``inference_mode``, because a training step may later use a tensor that a module caches now.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), serving(model):
            yield
    finally:
        for module, training in before:
            module.training = training
