"""The trials of ``train.learning_rate: auto`` as a small table for the terminal, whose bars are the curve."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from trimtab.runs.rate_record import ChosenRate

_WIDTH = 24
"""Letters of the longest bar, where there is room for them."""


class _Bar:
    """A bar over a ``share`` of the room that there is."""

    def __init__(self, share: float) -> None:
        self._share = share

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text("▪" * max(1, round(self._share * min(_WIDTH, options.max_width))))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, min(_WIDTH, options.max_width))


def rate_table(chosen: ChosenRate) -> Table:
    """A line a trial: its rate, its steps, its loss, and a bar that is longer the further the loss is above the best
    of its round."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("rate", "steps", "loss"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("above the best", min_width=4)
    for turn in sorted({trial.round for trial in chosen.trials}):
        trials = sorted((trial for trial in chosen.trials if trial.round == turn), key=lambda trial: trial.rate)
        losses = [trial.loss for trial in trials if trial.loss is not None]
        low, high = min(losses, default=0.0), max(losses, default=0.0)
        for trial in trials:
            mark: Text | _Bar = Text("best", "bold") if trial.loss == low else Text()
            if trial.loss is not None and trial.loss > low:
                mark = _Bar((trial.loss - low) / (high - low))
            style = "bold" if trial.loss == low else ""
            table.add_row(f"{trial.rate:g}", str(trial.steps), Text(trial.told, style), mark)
        table.add_section()
    return table
