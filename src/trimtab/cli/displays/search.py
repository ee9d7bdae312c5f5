"""What a search over plans looks like while it goes on: a line for each run, and the bar of the run at hand."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from trimtab.cli.displays.run import OneOfManyDisplay
from trimtab.reports.search.search_words import plan_words, score_words
from trimtab.reports.shared import words
from trimtab.studies.plan_search import SearchListener


class SearchDisplay(OneOfManyDisplay, SearchListener):
    """Draws a search on ``console``; ``metric`` is what it improves."""

    def __init__(self, console: Console, metric: str) -> None:
        super().__init__(console)
        self._metric = metric

    def trial_began(self, row: dict[str, Any], runs: int, trials: int) -> None:
        kind = "uniform " if row["kind"] == "uniform" else ""
        self.stage(f"Run {runs} of {trials}: {kind}{plan_words(row)} ({words.count(row['parameters'])} parameters)")

    def trial_ended(self, row: dict[str, Any]) -> None:
        if row["state"] == "failed":
            self.note(f"failed: {row['why']}")
            return
        score = f"{self._metric} {score_words({'metric': self._metric}, row['score'])}"
        where = f"pruned at step {row['validations'][-1][0]}, " if row["state"] == "pruned" else ""
        self.note(f"{where}{score}, {words.duration(row['seconds'])}")
