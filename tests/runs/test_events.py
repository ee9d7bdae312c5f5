"""What a listener hears of a run in another process."""

from __future__ import annotations

from trimtab.runs.events import TOLD, Listener, Steps


def test_all_that_a_study_passes_on_is_told_across_processes() -> None:
    passed_on = {name for name in vars(Steps) if not name.startswith("_")}
    assert passed_on <= TOLD.keys() <= vars(Listener).keys()
