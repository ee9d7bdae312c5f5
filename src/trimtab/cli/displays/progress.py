"""What all displays have in common: how time is written, and a bar that says how far something has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from trimtab.cli.displays.console import Terminal


def clock(seconds: float) -> str:
    """Such as ``4:05`` or ``1:00:09``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressLine:
    """One bar on the last line of a terminal. Anywhere else (and on a terminal that cannot move its cursor) it draws
    nothing, but still knows how much time is left."""

    def __init__(self, console: Terminal) -> None:
        self._console = console
        self._drawn: tuple[Progress, TaskID] | None = None
        self._began = (0.0, 0)

    @property
    def drawn(self) -> bool:
        """Whether the bar is on the terminal now."""
        return self._drawn is not None

    def start(self, what: str, done: int, total: int) -> None:
        """Begin a bar for ``what``, in place of the one that is there; ``done`` of ``total`` was done before."""
        self.stop()
        self._began = (time.perf_counter(), done)
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return
        progress = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}", markup=False),
            TextColumn("{task.fields[info]}", markup=False),
            console=self._console,
            expand=True,
        )
        progress.start()
        self._drawn = progress, progress.add_task(what, total=total, completed=done, info="")

    def update(self, info: str, done: int | None = None) -> None:
        """Write ``info`` behind the bar, and move it to ``done``; None leaves it where it is."""
        if self._drawn is not None:
            progress, task = self._drawn
            progress.update(task, completed=done, info=info)

    def stop(self) -> None:
        """Take the bar away, if one is there."""
        if self._drawn is not None:
            self._drawn[0].stop()
        self._drawn = None

    def left(self, done: int, total: int) -> str:
        """The time that the rest takes if it goes on as it went since ``start``."""
        began, first = self._began
        return f"{clock((time.perf_counter() - began) / max(1, done - first) * (total - done))} left"


@contextmanager
def working(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for ``what`` is worked on, which begins with the first call of what this gives: with how many are done, and
    of how many."""
    line = ProgressLine(Terminal(stderr=True))

    def progress(done: int, total: int) -> None:
        if not line.drawn:
            line.start(what, done - 1, total)
        line.update(line.left(done, total), done)

    try:
        yield progress
    finally:
        line.stop()
