"""The state that a model is in while it answers or is measured: nothing trains, and what that saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trimtab.surgery.adapted import adapted_modules


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """A context in which no trained tensor of ``model`` changes.

    Without gradients, an adapter with a magnitude keeps its norm (numbers per output, never a matrix) from one pass to
    the next, and compares its trained tensors with a copy each time, lest it use an old one. Here it takes the caller's
    word, compares nothing, and for passes of a few tokens finds out once what there is to compute, which a model that
    writes one token at a time is faster for. Where values are changed in here all the same, passes go on with the old
    norm until the context ends.

    ``trimtab evaluate`` and ``trimtab generate`` work in one. Contexts may be nested.
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
