"""What the engine counts while it works."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque

from trimtab.serving.requests import Histogram
from trimtab.serving.writing import Row

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_RECENT = 10.0  # seconds that a rate is taken over


class Observed:
    """Observations, counted by size."""

    def __init__(self, bounds: tuple[float, ...] = _SECONDS) -> None:
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def histogram(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


class Counters:
    """Counted by the engine's thread, but for ``refused``, which any thread may count; read by all."""

    def __init__(self) -> None:
        self.prompt_tokens = self.completion_tokens = self.steps = 0
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.first_token, self.duration = Observed(), Observed()
        self._recent: deque[tuple[float, int]] = deque()
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def refuse(self, error: Exception) -> None:
        with self._lock:
            self.refused[type(error).__name__] += 1

    def passed(self, prompt_tokens: int, new_tokens: int) -> None:
        """A pass has read so many tokens of prompts, and gave so many new ones."""
        now = time.monotonic()
        self.steps += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += new_tokens
        with self._lock:
            self._recent.append((now, new_tokens))
            self._forget(now)

    def ended(self, row: Row) -> None:
        self.finished["error" if row.failed is not None or row.over is None else row.over] += 1
        self.duration.add(time.monotonic() - row.submitted)
        if row.first_token is not None:
            self.first_token.add(row.first_token - row.submitted)

    def rate(self) -> float:
        """New tokens a second, of late."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            total = sum(count for _, count in self._recent)
        return total / max(min(_RECENT, now - self._began), 1e-3)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - _RECENT:
            self._recent.popleft()
