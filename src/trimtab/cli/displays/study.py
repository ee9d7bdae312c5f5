"""What a study looks like while it goes on: the run at hand, and a line for each that is done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.cli.displays.console import Terminal
from trimtab.cli.displays.run import OneOfManyDisplay
from trimtab.metrics import first_in
from trimtab.reports.shared import words
from trimtab.runs.study_records import CellRecord
from trimtab.studies.cell import finished_cell
from trimtab.studies.compare import StudyListener, chosen_runs
from trimtab.studies.study_cells import Cell, Study


class StudyDisplay(StudyListener, OneOfManyDisplay):
    """Draws a study on ``console``; of each run only the live line. Of runs elsewhere one line has how far each is."""

    def __init__(self, console: Terminal) -> None:
        super().__init__(console)
        # By the cell's folder.
        self._headings: dict[Path, str] = {}
        self._began: dict[Path, float] = {}
        self._elsewhere: dict[Path, str] = {}
        self._done, self._total = 0, 0
        # Of the searches for learning rates (True), and of the runs: a run takes longer than a search does.
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._missing = {True: 0, False: 0}

    def planned(self, searches: int, runs: int) -> None:
        self._missing = {True: searches, False: runs}
        self._total = searches + runs

    def cell_placed(self, cell: Cell, where: str) -> None:
        self._elsewhere[cell.config.output] = f"{cell.name} on {where}"

    def cell_began(self, cell: Cell, number: int, total: int) -> None:
        place, again = cell.config.output, cell.config.output in self._headings
        _, _, where = self._elsewhere.get(place, "").rpartition(" on ")
        on = f", on {where}" if where else ""
        self._headings[place] = f"[{number}/{total}] {cell.name}"
        self._began[place] = time.perf_counter()
        super().note(f"{self._headings[place]}{on}{self._time_left(cell.searching)}")
        self._missing[cell.searching] -= not again
        if where:
            self._draw_elsewhere()

    def cell_went_on(self, cell: Cell, step: int, steps: int) -> None:
        if (where := self._elsewhere.get(cell.config.output)) is not None:
            self._elsewhere[cell.config.output] = f"{where.partition(':')[0]}: {step}/{steps}"
            self._draw_elsewhere()

    def cell_told(self, cell: Cell, words: str) -> None:
        super().note(f"{self._heading(cell)}: {words}")
        self._gone(cell)

    def cell_ended(self, cell: Cell, result: CellRecord) -> None:
        if (began := self._began.get(cell.config.output)) is not None:
            self._seconds[cell.searching].append(time.perf_counter() - began)
        super().note(f"{self._heading(cell)}: {told(cell, result)}")
        self._done += 1
        self._gone(cell)

    def cell_failed(self, cell: Cell, reason: str) -> None:
        super().note(f"{self._heading(cell)}: failed: {reason}")
        self._done += 1
        self._gone(cell)

    def _heading(self, cell: Cell) -> str:
        """What its lines begin with; a cell that was refused before it began has no number."""
        return self._headings.get(cell.config.output, cell.name)

    def _gone(self, cell: Cell) -> None:
        if self._elsewhere.pop(cell.config.output, None) is not None:
            self._draw_elsewhere()

    def _draw_elsewhere(self) -> None:
        """One bar for all the runs that go on elsewhere."""
        if not self._elsewhere:
            self._bar.stop()
            return
        if not self._bar.drawn:
            self._bar.start("runs", self._done, self._total)
        self._bar.update("; ".join(self._elsewhere.values()), self._done)

    def stage(self, text: str) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        if text.startswith(("resuming", "interrupted")):
            super().note(text)

    def show(self, renderable: Any) -> None:
        pass

    def evaluated(self, result: dict[str, Any]) -> None:
        pass

    def _time_left(self, searching: bool) -> str:
        """As long as those of its kind took that came to their end."""
        if not self._seconds[searching]:
            return ""
        seconds = self._missing[searching] * statistics.mean(self._seconds[searching]) / max(1, len(self._elsewhere))
        return f", about {words.duration(seconds)} left{' of the search' if searching else ''}"


def told(cell: Cell, result: CellRecord) -> str:
    """The score of a run, its time and its memory, in a few words."""
    if cell.searching:
        assert result.kept is not None, "a search has validation rows"
        scores = [_score("validation", {**result.kept.figures, "loss": result.kept.loss})]
    else:
        scores = [_score(name, test.figures) for name, test in result.tests.items()]
    costs = [words.duration(result.total_seconds), words.gib(result.peak_memory_gib)]
    return ", ".join([*scores, *costs])


def _score(name: str, figures: Mapping[str, float | None]) -> str:
    """The main metric of these figures."""
    metric = first_in(figures)
    assert metric is not None, "a result has its main metric, and a validation its loss"
    value = figures[metric.name]
    if metric.name == "loss":
        return f"{name} loss {value:.3f}"
    return f"{name} {metric.label} {words.percent(value) if metric.share else words.number(value)}"


def cells_table(study: Study) -> Table:
    """Every run of a study, and what it gave if it is done."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("task", "arm", "seed", "learning rate", "done"):
        table.add_column(head, justify="right" if head in ("seed", "learning rate") else "left")
    for task in study.said.tasks:
        for arm in study.said.arms:
            chosen = chosen_runs(study, task, arm)
            for cell in (*study.searches(task, arm), *(chosen or study.runs(task, arm, None))):
                result = finished_cell(cell.config) if cell.searching or chosen else None
                found = cell.learning_rate if result is None else result.learning_rate or cell.learning_rate
                rate = f"{found:g}" if isinstance(found, float) else "as its trials find"
                rate = rate if cell.searching or chosen else "as the search finds"
                seed = f"search {cell.seed}" if cell.searching else str(cell.seed)
                rate = rate if cell.config.train.epochs else words.DASH
                table.add_row(task, arm, seed, rate, told(cell, result) if result is not None else words.DASH)
    return table
