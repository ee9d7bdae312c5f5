"""Runs whatever a study still lacks.

First the searches for learning rates, then seed after seed, so that a study that is cut off is a smaller study. A cell
that fails is noted, and the others are still run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import Interrupted, RunError
from trimtab.metrics import best_by
from trimtab.runs.events import Listener
from trimtab.runs.lock import locked
from trimtab.runs.records import MetricsLine
from trimtab.runs.study_records import CellRecord
from trimtab.studies.cell import finished_cell, run_cell
from trimtab.studies.places import HERE, Errand, Place
from trimtab.studies.study_cells import Cell, Study


class StudyListener(Listener):
    """Receives what happens in a study, too. Every method does nothing here."""

    def planned(self, searches: int, runs: int) -> None:
        """Before the first cell: how many are missing of the searches for learning rates, and of the runs."""

    def cell_began(self, cell: Cell, number: int, total: int) -> None:
        """``cell`` is run as number ``number`` (from 1) of ``total`` that were missing."""

    def cell_placed(self, cell: Cell, where: str) -> None:
        """``cell``, which is about to begin, is run elsewhere, on the machine ``where``; others may be run at once."""

    def cell_went_on(self, cell: Cell, step: int, steps: int) -> None:
        """Elsewhere, ``cell`` has come to ``step`` of ``steps``."""

    def cell_told(self, cell: Cell, words: str) -> None:
        """Elsewhere, something became of ``cell`` on the way, such as that its worker was lost."""

    def cell_ended(self, cell: Cell, result: CellRecord) -> None:
        """``cell`` is done and on disk."""

    def cell_failed(self, cell: Cell, reason: str) -> None:
        """``cell`` failed; the others go on."""


@dataclass(frozen=True)
class Selection:
    """Which part of a study is run; empty for all."""

    tasks: frozenset[str] = frozenset()
    arms: frozenset[str] = frozenset()

    def pairs(self, study: Study) -> Iterator[tuple[str, str]]:
        """Task and arm of every part that is selected."""
        for task in study.said.tasks:
            for arm in study.said.arms:
                if (not self.tasks or task in self.tasks) and (not self.arms or arm in self.arms):
                    yield task, arm


class _CellErrand(Errand):
    """The run of a cell that may be done elsewhere."""

    def __init__(self, study: Study, cell: Cell, listener: StudyListener, begin: Callable[[Cell, str], None]) -> None:
        super().__init__(cell.config, study.said.keep)
        self._cell, self._listener, self._begin = cell, listener, begin

    def began(self, where: str) -> None:
        self._begin(self._cell, where)

    def told(self, words: str) -> None:
        self._listener.cell_told(self._cell, words)

    def training_began(self, step: int, steps: int) -> None:
        self._listener.cell_went_on(self._cell, step, steps)

    def step(self, step: int, steps: int) -> None:
        self._listener.cell_went_on(self._cell, step, steps)


def compare(
    study: Study, listener: StudyListener | None = None, selection: Selection | None = None, *, on: Place = HERE
) -> list[tuple[Cell, str]]:
    """Run every selected cell that is not done, ``on`` this machine or elsewhere; gives those that failed, with the
    reason.

    Raises:
        RunError: another process is at this study, or a cell's file is damaged.
        Interrupted: by the user; what was done is kept.
    """
    listener, selection = listener or StudyListener(), selection or Selection()
    failed: list[tuple[Cell, str]] = []
    with locked(study.folder / "cells" / ".lock"):
        pairs = list(selection.pairs(study))
        searches = [cell for pair in pairs for cell in study.searches(*pair)]
        # A run's folder depends on the rate that is found; how many runs there are does not.
        later = sum(_missing(study, task, arm) for task, arm in pairs)
        missing = [cell for cell in searches if finished_cell(cell.config) is None]
        total = len(missing) + later
        numbers: dict[Path, int] = {}
        listener.planned(len(missing), later)

        def begin(cell: Cell, where: str) -> None:
            # A cell whose worker was lost begins again under its number.
            number = numbers.setdefault(cell.config.output, len(numbers) + 1)
            if where:
                listener.cell_placed(cell, where)
            listener.cell_began(cell, number, total)

        def run(cells: Sequence[Cell]) -> None:
            there = [cell for cell in cells if finished_cell(cell.config) is None]
            for cell in cells:
                if cell not in there:
                    run_cell(cell.config, keep=study.said.keep)  # removes what it left where it was cut off
            for place, failure in on.bring([_CellErrand(study, cell, listener, begin) for cell in there]):
                cell = there[place]
                try:
                    if failure is not None:
                        raise failure
                    result = run_cell(cell.config, listener, keep=study.said.keep)
                except Interrupted:
                    raise
                except RunError as error:
                    failed.append((cell, str(error)))
                    listener.cell_failed(cell, str(error))
                else:
                    listener.cell_ended(cell, result)

        run(searches)
        arms = [runs for pair in pairs if (runs := chosen_runs(study, *pair)) is not None]
        run([runs[turn] for turn in range(len(study.said.seeds)) for runs in arms if turn < len(runs)])
    return failed


def chosen_runs(study: Study, task: str, arm: str) -> list[Cell] | None:
    """The runs of an arm with the learning rate that its search found; None while no search run is done."""
    searched = study.searches(task, arm)
    if not searched:
        return study.runs(task, arm, None)
    done = {cell.learning_rate: result for cell in searched if (result := finished_cell(cell.config)) is not None}
    if not done:
        return None
    best = min(done, key=lambda rate: _preference(searched[0], done[rate].kept))
    return study.runs(task, arm, best)


def _preference(cell: Cell, line: MetricsLine | None) -> tuple[float, ...]:
    """A key that sorts the best run first: by its validation metric, and by its loss among equals."""
    assert line is not None, "a search has validation rows"
    assert line.loss is not None, "every validation has a loss"
    best = best_by(cell.config.train.metric, scored=bool(line.figures))
    value = line.figure(best.name)
    return (line.loss,) if value is None else (best.cost(value), line.loss)


def _missing(study: Study, task: str, arm: str) -> int:
    """How many runs of an arm are not done, all of them where the learning rate is not known yet."""
    if any(finished_cell(cell.config) is None for cell in study.searches(task, arm)):
        return len(study.runs(task, arm, None))
    return sum(finished_cell(cell.config) is None for cell in chosen_runs(study, task, arm) or [])
