"""A promise that nothing trains, and what it saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
