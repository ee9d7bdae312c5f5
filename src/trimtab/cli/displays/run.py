"""What a run looks like while it goes on: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from trimtab.cli.displays.console import Terminal
from trimtab.cli.displays.progress import ProgressLine
from trimtab.metrics import compared
from trimtab.reports.shared import words
from trimtab.runs.events import Listener


def _figures(row: dict[str, Any]) -> list[str]:
    shown = [(metric, value) for metric in compared() if (value := row.get(metric.name)) is not None]
    return [f"{metric.label} {words.figure(metric, value)}" for metric, value in shown]


class RunDisplay(Listener):
    """Draws a run on ``console``. Use it as a context: the bar goes with it, whatever happens."""

    def __init__(self, console: Terminal) -> None:
        self._console = console
        self._asides = Terminal(stderr=True)
        self._bar = ProgressLine(console)
        self._last: dict[str, Any] = {}
        self._steps = 0
        self._counted = "tokens"
        self._training = False
        self._along = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, text: str) -> None:
        self._bar.stop()
        self._console.print(text, style="bold", soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", soft_wrap=True)

    def remark(self, text: str) -> None:
        # Where a bar is drawn, whatever is printed has to go by its console.
        console = self._console if self._bar.drawn else self._asides
        console.print(f"  note: {text}", style="yellow", soft_wrap=True)

    def show(self, renderable: Any) -> None:
        self._console.print(renderable, soft_wrap=not self._console.is_terminal)

    def counting(self, what: str) -> None:
        self._counted = what

    def training_began(self, step: int, steps: int) -> None:
        self._steps = steps
        self._training = True
        self._bar.start("training", step, steps)

    def step(self, step: int, steps: int) -> None:
        self._bar.update(self._info(step), done=step)

    def metrics(self, row: dict[str, Any]) -> None:
        if row["kind"] == "validation":
            self.note(", ".join([f"step {row['step']}: validation loss {row['loss']:.4f}", *_figures(row)]))
            self.step(row["step"], self._steps)
            return
        self._last = row
        if not self._bar.drawn:
            self.note(f"step {row['step']}/{self._steps}  {self._info(row['step'])}")

    def training_ended(self) -> None:
        self._training = False
        self._bar.stop()

    def evaluated(self, result: dict[str, Any]) -> None:
        self.note(", ".join(_figures(result)))

    def trying(self, rate: float, step: int, steps: int) -> None:
        self._gone_along(f"trial at {rate:g}", step, steps)

    def evaluating(self, name: str, done: int, total: int) -> None:
        if self._training:  # a validation: the training bar stays
            self._bar.update(f"validating, {done:,} of {total:,} rows")
        else:
            self._gone_along(name, done, total)

    def _gone_along(self, name: str, done: int, total: int) -> None:
        """Draw how far what has a bar of its own has come; the bar goes at its end."""
        if not self._bar.drawn or name != self._along:  # a trial that diverges does not come to its end
            self._along = name
            self._bar.start(name, 0, total)
        if done:
            self._bar.update(self._bar.left(done, total), done=done)
        if done >= total:
            self._bar.stop()

    def _info(self, step: int) -> str:
        left, row = self._bar.left(step, self._steps), self._last
        if not row:
            return left
        speed = f"{row['tokens_per_second']:,.0f} {self._counted}/s"
        return f"loss {row['loss']:.4f}  {speed}  {left}  {row.get('device_memory_gib', row['memory_gib']):.2f} GiB"


class OneOfManyDisplay(RunDisplay):
    """Draws a run among many: of its training only the bar, since a line for each step would be too many; and what
    several of them remark, once."""

    def __init__(self, console: Terminal) -> None:
        super().__init__(console)
        self._remarked: set[str] = set()

    def remark(self, text: str) -> None:
        if text not in self._remarked:
            self._remarked.add(text)
            super().remark(text)

    def metrics(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            self._last = row
