"""What a memory study looks like while it goes on: every arm's curve live on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Group, JustifyMethod, OverflowMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from memory_bench import MemoryListener
from memory_cell import CurvePoint
from memory_study import CONTENDERS, SEARCH_SEED, Arm, MemoryCell, MemoryStudy
from trimtab.cli.displays.console import Terminal
from trimtab.cli.displays.progress import clock

_LEVELS = "▁▂▃▄▅▆▇█"
_QUIET_SECONDS = 60.0
"""Without a terminal a cell that takes long is heard of this often."""


def sparkline(accuracies: list[float]) -> str:
    """A letter for each point of a curve, the higher the nearer to 1."""
    return "".join(_LEVELS[min(int(value * len(_LEVELS)), len(_LEVELS) - 1)] for value in accuracies)


class MemoryDisplay(MemoryListener):
    """Draws a study on ``console``. Use it as a context: the live part ends with it, whatever happens."""

    def __init__(self, console: Terminal) -> None:
        self._console = console
        self._live: Live | None = None
        self._study: MemoryStudy | None = None
        self._parameters: Mapping[Arm, int] = {}
        self._curves: dict[Arm, tuple[MemoryCell, list[float]]] = {}
        self._done = self._trained = 0
        self._spent = 0.0
        self._heard = time.monotonic()

    def __enter__(self) -> MemoryDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def planned(self, study: MemoryStudy, parameters: Mapping[Arm, int]) -> None:
        self._study, self._parameters = study, parameters
        self._say(
            f"{study.pairs:,} pairs of {study.digits} digits, {study.blocks or 'all'} blocks of {study.model}, "
            f"{study.steps:,} steps: {study.size} cells"
        )
        if self._console.is_terminal:
            self._live = Live(self._picture(), console=self._console, refresh_per_second=4)
            self._live.start()
        else:
            for arm, count in parameters.items():
                self._say(f"  {_name(arm)}: {count:,} parameters")

    def began(self, cell: MemoryCell) -> None:
        self._curves[cell.arm] = (cell, [])
        self._heard = time.monotonic()

    def evaluated(self, cell: MemoryCell, point: CurvePoint) -> None:
        assert self._study is not None
        self._curves[cell.arm][1].append(point["accuracy"])
        self._draw()
        if self._live is None and time.monotonic() - self._heard > _QUIET_SECONDS:
            self._heard = time.monotonic()
            step = f"step {point['step']:,}/{self._study.steps:,}"
            self._say(f"    {_words(cell)}: {step}, {100 * point['accuracy']:.1f} % right")

    def ended(self, cell: MemoryCell, result: Mapping[str, Any], fresh: bool) -> None:
        accuracies = [point["accuracy"] for point in result["curve"]]
        self._curves[cell.arm] = (cell, accuracies)
        self._done += 1
        self._trained += fresh
        self._spent += result["seconds"] * fresh
        self._draw()
        if self._live is None:
            took = f"{result['seconds']:.0f} s" if fresh else "done before"
            self._say(
                f"  {self._progress()} {_words(cell)}: {sparkline(accuracies)} {100 * accuracies[-1]:.1f} % right"
                f"{', diverged' if result['diverged'] else ''} ({took}){self._left()}"
            )

    def _progress(self) -> str:
        assert self._study is not None
        return f"{self._done}/{self._study.size}"

    def _left(self) -> str:
        assert self._study is not None
        left = self._study.size - self._done
        return f", {clock(self._spent / self._trained * left)} left" if self._trained and left else ""

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._picture())

    def _picture(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("method", "rank", "trained", "latest", "character accuracy over steps", ""):
            justify: JustifyMethod = "right" if title in ("rank", "trained", "") else "left"
            overflow: OverflowMethod = "crop" if title.startswith("character") else "ellipsis"  # the curve may be cut
            table.add_column(title, justify=justify, overflow=overflow, no_wrap=True)
        for arm, count in self._parameters.items():
            cell, accuracies = self._curves.get(arm, (None, []))
            table.add_row(
                CONTENDERS[arm.contender].label,
                str(arm.budget or ""),
                f"{count:,}",
                "" if cell is None else _which(cell),
                sparkline(accuracies),
                f"{100 * accuracies[-1]:.1f} %" if accuracies else "",
            )
        return Group(Text(f"cells {self._progress()}{self._left()}"), table)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _name(arm: Arm) -> str:
    label = CONTENDERS[arm.contender].label
    return label if arm.budget is None else f"{label}, rank {arm.budget}"


def _which(cell: MemoryCell) -> str:
    return f"{'search' if cell.seed == SEARCH_SEED else f'seed {cell.seed}'}, lr {cell.learning_rate:g}"


def _words(cell: MemoryCell) -> str:
    return f"{_name(cell.arm)}, {_which(cell)}"
