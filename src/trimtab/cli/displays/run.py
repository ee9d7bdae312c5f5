"""What a run looks like while it goes on: a live display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from trimtab.runs.events import Listener

_SHARES = (("accuracy", "accuracy"), ("macro_f1", "macro F1"), ("exact_match", "exact match"))


def _shares(row: dict[str, Any]) -> list[str]:
    return [f"{words} {100 * row[key]:.1f} %" for key, words in _SHARES if key in row]


def duration(seconds: float) -> str:
    """Such as ``4:05`` or ``1:00:09``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display(Listener):
    """Draws a run on ``console``. Use it as a context: the live part ends with it, whatever happens."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._began = (0.0, 0)
        self._last: dict[str, Any] = {}
        self._steps = 0
        self._training = False

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def stage(self, text: str) -> None:
        self._stop()
        self._console.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        self._console.print(renderable, soft_wrap=not self._console.is_terminal)

    def training_began(self, step: int, steps: int) -> None:
        self._steps = steps
        self._training = True
        self._start("training", step, steps)

    def step(self, step: int, steps: int) -> None:
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, info=self._info(step))

    def metrics(self, row: dict[str, Any]) -> None:
        if row["kind"] == "validation":
            self.note(", ".join([f"step {row['step']}: validation loss {row['loss']:.4f}", *_shares(row)]))
            self.step(row["step"], self._steps)
            return
        self._last = row
        if self._live is None:
            self.note(f"step {row['step']}/{self._steps}  {self._info(row['step'])}")

    def training_ended(self) -> None:
        self._training = False
        self._stop()

    def evaluated(self, result: dict[str, Any]) -> None:
        self.note(", ".join([*_shares(result), f"perplexity {result['perplexity']:.4g}"]))

    def evaluating(self, name: str, done: int, total: int) -> None:
        if self._training:  # a validation: the training bar stays
            if self._live is not None and self._task is not None:
                self._live.update(self._task, info=f"validating, {done:,} of {total:,} rows")
            return
        if self._live is None:
            self._start(name, 0, total)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, info=self._left(done, total))
        if done >= total:
            self._stop()

    def _info(self, step: int) -> str:
        left, row = self._left(step, self._steps), self._last
        if not row:
            return left
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        return f"loss {row['loss']:.4f}  {speed}  {left}  {row['memory_gib']:.2f} GiB"

    def _left(self, done: int, total: int) -> str:
        began, first = self._began
        return f"{duration((time.perf_counter() - began) / max(1, done - first) * (total - done))} left"

    def _start(self, what: str, done: int, total: int) -> None:
        self._stop()
        self._began = (time.perf_counter(), done)
        if not self._console.is_terminal:
            return
        self._live = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[info]}"),
            console=self._console,
            expand=True,
        )
        self._live.start()
        self._task = self._live.add_task(what, total=total, completed=done, info="")

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = self._task = None
