"""The trials of learning rates, shown on terminals of any width and encoding."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import trimtab.cli.terminal  # noqa: F401 -- knows plain letters for our signs
from trimtab.reports.run.rate_table import rate_table
from trimtab.runs.rate_record import ChosenRate, RateTrial

LOSSES = {1.13e-5: 2.3, 2.44e-5: 2.2, 5.26e-5: 2.0, 1.13e-4: 2.4, 2.44e-4: None}


def shown(width: int) -> list[str]:
    trials = [RateTrial(round=1, rate=rate, steps=1632, loss=loss, seconds=1.0) for rate, loss in LOSSES.items()]
    chosen = ChosenRate(rate=1e-5, likely=1e-5, run_steps=9000, rows=8, cost=1.0, trials=trials)
    console = Console(width=width, file=io.StringIO())
    console.print(rate_table(chosen))
    written = console.file
    assert isinstance(written, io.StringIO)
    return written.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_bars_say_how_far_a_loss_is_above_the_best_on_terminals_of_any_width(width: int) -> None:
    lines = shown(width)
    bars = [next(line for line in lines if f"{rate:g} " in line).count("▪") for rate in LOSSES]
    assert bars[3] >= 8
    assert [bars[0], bars[1]] == [round(bars[3] * share) for share in (0.75, 0.5)]
    assert [bars[2], bars[4]] == [0, 0]
    assert "…" not in "".join(lines)


def test_bars_have_plain_letters_where_a_terminal_has_no_others() -> None:
    plain = "\n".join(shown(80)).encode("ascii", "trimtab.plainly").decode()
    assert "#" * 24 in plain
    assert "\\u" not in plain
