"""How fast a run trains: one count of tokens and seconds for all who want to know."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Tokens that were trained on, and the seconds that took. Reading it changes nothing: readers take differences."""

    def __init__(self) -> None:
        self._tokens = 0
        self._began = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count ``tokens`` more."""
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose seconds do not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began

    def so_far(self) -> tuple[int, float]:
        """Tokens, and seconds."""
        return self._tokens, time.perf_counter() - self._began
