"""What a run measures of itself while it trains: how fast it goes, and the lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trimtab.machine import device_memory_gib, memory_gib
from trimtab.processes import here
from trimtab.runs.events import Listener
from trimtab.runs.records import MetricsLine

if TYPE_CHECKING:
    import torch


class LogsAtOnce:
    """A mixin for transformers' Trainer, which reads the loss and then the gradient's norm for a line of the log, and
    has to wait for the device at each of them: they are read in one transfer."""

    def _maybe_log_save_evaluate(self: Any, tr_loss: torch.Tensor, grad_norm: Any, *others: Any, **named: Any) -> None:
        logs = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if logs and here().size == 1 and hasattr(grad_norm, "to"):  # a tensor
            both = tr_loss.new_zeros(2)
            both[0], both[1] = tr_loss, grad_norm
            tr_loss -= tr_loss  # as the Trainer does once it has read it
            tr_loss, grad_norm = both.cpu()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *others, **named)  # type: ignore[misc]


class Recorder:
    """A context in which metrics are recorded; each line is on disk before ``record`` returns.

    Args:
        path: ``metrics.jsonl``; lines are added to it.
        listener: is told of each line.
        tensorboard: a folder for events, or None for none.
        earlier: seconds that the run was trained for before it was interrupted; ``done``: how many of its steps are
            kept. Events after those are shown no more.
        device: where it trains.
    """

    def __init__(
        self,
        path: Path,
        listener: Listener,
        tensorboard: Path | None,
        earlier: float = 0.0,
        done: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._listener = listener
        self._device = device
        self._began = time.perf_counter() - earlier
        self._file = path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(tensorboard), purge_step=done + 1)

    def record(self, line: MetricsLine) -> None:
        """Add one line, with the time since training began and, for training, the memory in use."""
        line = line.updated(seconds=round(time.perf_counter() - self._began, 2))
        if line.kind == "train":
            line = line.updated(memory_gib=round(memory_gib(), 3))
            if (there := device_memory_gib(self._device)) is not None:
                line = line.updated(device_memory_gib=round(there, 3))
        row = line.plain()
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch", "seconds"):
                    self._events.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        self._listener.metrics(row)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


class Throughput:
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
    """What ``throughput`` has counted since one reader last asked; at first, since it was made."""

    def __init__(self, throughput: Throughput) -> None:
        self._throughput = throughput
        self._last = throughput.so_far()

    def read(self) -> tuple[int, float]:
        """Tokens, and seconds; the next lap begins."""
        (tokens, seconds), last = self._throughput.so_far(), self._last
        self._last = tokens, seconds
        return tokens - last[0], seconds - last[1]
