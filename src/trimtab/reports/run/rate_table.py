"""The trials of ``train.learning_rate: auto`` as a small table for the terminal, whose bars are the curve."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from trimtab.runs.rate_record import ChosenRate

_WIDTH = 24
"""Letters of the longest bar."""


def rate_table(chosen: ChosenRate) -> Table:
    """A line a trial: its rate, its steps, its loss, and a bar that is longer the further the loss is above the best
    of its round."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title, justify in (("rate", "right"), ("steps", "right"), ("loss", "right"), ("above the best", "left")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for turn in sorted({trial.round for trial in chosen.trials}):
        trials = sorted((trial for trial in chosen.trials if trial.round == turn), key=lambda trial: trial.rate)
        losses = [trial.loss for trial in trials if trial.loss is not None]
        low, high = min(losses, default=0.0), max(losses, default=0.0)
        for trial in trials:
            if trial.loss is None:
                table.add_row(f"{trial.rate:g}", str(trial.steps), "diverged", "")
                continue
            length = round(_WIDTH * (trial.loss - low) / (high - low)) if high > low else 0
            best = trial.loss == low
            mark = Text("best", style="bold") if best else Text("▪" * max(1, length))
            table.add_row(f"{trial.rate:g}", str(trial.steps), Text(f"{trial.loss:.4f}", "bold" if best else ""), mark)
        table.add_section()
    return table
