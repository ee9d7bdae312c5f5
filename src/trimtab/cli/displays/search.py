"""What a search over plans looks like while it goes on: a line for each run, and the bar of the run at hand."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.cli.displays.console import Terminal
from trimtab.cli.displays.run import OneOfManyDisplay
from trimtab.config.values import Rate
from trimtab.metrics import METRICS
from trimtab.reports.search.search_words import plan_words, score_words
from trimtab.reports.shared import words
from trimtab.runs.study_records import Trial
from trimtab.studies.plan_search import SearchListener


class SearchDisplay(OneOfManyDisplay, SearchListener):
    """Draws a search on ``console``; ``metric`` is what it improves, and ``rates`` are the learning rates that it
    chooses from."""

    def __init__(self, console: Terminal, metric: str, rates: Sequence[Rate]) -> None:
        super().__init__(console)
        self._metric = metric
        self._names_rates = len(rates) > 1

    def trial_began(self, trial: Trial, runs: int, trials: int) -> None:
        kind = "uniform " if trial.kind == "uniform" else ""
        rate = f", rate {trial.learning_rate:g}" if self._names_rates else ""
        parameters = f"{words.count(trial.parameters)} parameters"
        self.stage(f"Run {runs} of {trials}: {kind}{plan_words(trial)}{rate} ({parameters})")

    def trial_told(self, trial: Trial, words: str) -> None:
        self.note(f"{plan_words(trial)}: {words}")

    def trial_ended(self, trial: Trial) -> None:
        if trial.state == "failed":
            self.note(f"failed: {trial.why}")
            return
        score = f"{self._metric} {score_words(METRICS[self._metric], trial.score)}"
        where = f"pruned at step {trial.validations[-1][0]}, " if trial.state == "pruned" else ""
        self.note(f"{where}{score}, {words.duration(trial.seconds)}")
