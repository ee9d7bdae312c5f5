"""Contexts that make a model faster while it is used and not trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trimtab.surgery.adapted import adapted_modules


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """A context in which the caller promises that no trained tensor of ``model`` changes.

    Without gradients, an adapter with a magnitude keeps its norm (one number per output) from one pass to the next.
    Each pass compares the trained tensors with a copy, so that an outdated norm is never used, but not in this context.
    For passes of a few tokens, tensors are also prepared once, which speeds up writing one token at a time. If trained
    tensors change in this context all the same, the outdated norm is used until it ends. Contexts may be nested.
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
    """Eval mode, without gradients, inside ``serving``. Afterwards every module has the mode that it had before.

    Modes are restored module by module, since a frozen part may be in eval mode inside a training model. Gradients are
    off by ``no_grad`` and not by ``inference_mode``, because a training step may later use tensors that are cached now.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), serving(model):
            yield
    finally:
        for module, training in before:
            module.training = training
