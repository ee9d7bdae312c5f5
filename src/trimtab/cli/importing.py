"""Importing what a verb works with, sooner."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """A context for imports of torch and transformers, in which Python looks for no garbage.

    They make hundreds of thousands of objects that stay. Looking through those again and again, while more are made,
    takes a sixth of the time until ``trimtab plan`` begins. What is there at the end of the first such context is not
    looked through later, either: modules are never garbage.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        if was_on:
            gc.enable()
