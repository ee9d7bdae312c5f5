"""The bars of a run."""

from __future__ import annotations

import io

from rich.console import Console

from trimtab.cli.displays.run import RunDisplay


def test_a_trial_has_its_own_bar_also_after_one_that_did_not_come_to_its_end() -> None:
    bars = []
    with RunDisplay(Console(file=io.StringIO(), force_terminal=True, width=100)) as display:
        for rate, steps in ((0.1, range(3)), (0.001, range(5))):
            for step in steps:
                display.trying(rate, step, 4)
                bars.append(_drawn(display))
    assert bars == [
        *(("trial at 0.1", 0, ""), ("trial at 0.1", 1, "0:00 left"), ("trial at 0.1", 2, "0:00 left")),
        *(("trial at 0.001", 0, ""), *(("trial at 0.001", step, "0:00 left") for step in (1, 2, 3)), None),
    ]


def _drawn(display: RunDisplay) -> tuple[str, float, str] | None:
    """What the bar says: its name, how far it is, and what stands behind it."""
    drawn = display._bar._drawn
    if drawn is None:
        return None
    (task,) = drawn[0].tasks
    return task.description, task.completed, task.fields["info"]
