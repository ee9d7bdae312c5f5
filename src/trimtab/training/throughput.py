"""How fast a run trains: one count of tokens and seconds for all who want to know."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Tokens that were trained on, and the seconds that took. Reading it changes nothing; a `Lap` takes differences."""

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


class Lap:
    """What ``pace`` has counted since one reader last asked; at first, since it was made."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._last = pace.so_far()

    def read(self) -> tuple[int, float]:
        """Tokens, and seconds; the next lap begins."""
        (tokens, seconds), last = self._pace.so_far(), self._last
        self._last = tokens, seconds
        return tokens - last[0], seconds - last[1]
