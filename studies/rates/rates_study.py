"""What the study of learning rates is told, its cells, and in which order they are run.

A *cell* is an arm on a task at one rate with one seed. It is known by these four alone: ``STATE/cells/TASK/ARM/
RATE-seedN.json`` keeps beside its results what the YAML said of it and a digest of its rows, and a cell of other
settings is refused. What the library's code is plays no part, so a study goes on across its versions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rates_rows import write_rows
from trimtab.config.run import Section
from trimtab.config.study import merge_settings, read_study
from trimtab.errors import RunError
from trimtab.files import read_json

PHRASEBANK = Path(__file__).parents[3] / "shared/data/finance/fpb_train.jsonl"
PER_DECADE = 3


class RatesArm(Section):
    """An arm: what differs from the base, and where its rates lie."""

    plan: list[dict[str, Any]] = Field(description="As in a run's YAML.")
    train: dict[str, Any] = Field(default_factory=dict, description="What differs from base.train.")
    tasks: list[str] | None = Field(None, description="On which tasks; null: on all of them.")
    rates: Literal["adapters", "full"] = Field("adapters", description="Which of the two grids it starts with.")


class RatesConfig(Section):
    """What the YAML may say."""

    base: dict[str, Any] = Field(description="What all cells have in common: keys of a run's YAML.")
    tasks: list[Literal["sentiment", "orders"]] = Field(min_length=1, description="See `rates_rows`.")
    seeds: list[int] = Field(min_length=1, description="train.seed of the cells.")
    rates: dict[Literal["adapters", "full"], list[float]] = Field(description="Lowest and highest rate of each grid.")
    beyond: int = Field(3, ge=0, description="How many rates a grid may grow by at an end where its best lies.")
    arms: dict[str, RatesArm] = Field(min_length=1, description="Name -> arm.")
    state: str = Field("state", description="Where rows and cells lie, relative to the YAML's folder.")
    output: str = Field("results", description="Where the results go, relative to the YAML's folder.")
    phrasebank: str = Field(str(PHRASEBANK), description="Training rows of the Financial PhraseBank.")


def at_lattice(index: float) -> float:
    """The rate at the place ``index`` of the lattice that all grids lie on; 0 is 1."""
    return float(f"{10 ** (index / PER_DECADE):.3g}")


def lattice_index(rate: float) -> int:
    """The place on the lattice that is nearest to ``rate``."""
    return round(math.log10(rate) * PER_DECADE)


@dataclass(frozen=True)
class RateCell:
    """One training."""

    task: str
    arm: str
    index: int
    seed: int

    @property
    def rate(self) -> float:
        return at_lattice(self.index)

    def __str__(self) -> str:
        return f"{self.arm} on {self.task} at {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class RatesStudy:
    """A study that was read; its rows are written."""

    said: RatesConfig
    state: Path
    output: Path

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Task and arm of every grid, in the order in which they are run."""
        return [
            (task, name)
            for name, arm in self.said.arms.items()
            for task in self.said.tasks
            if arm.tasks is None or task in arm.tasks
        ]

    def rows(self, task: str, part: str) -> Path:
        """The file of the rows to train on or of those for ``validation``."""
        return self.state / "rows" / f"{task}-{part}.jsonl"

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of every task's rows."""
        return {
            task: hashlib.sha256(self.rows(task, "train").read_bytes() + self.rows(task, "validation").read_bytes())
            .hexdigest()[:16]
            for task in self.said.tasks
        }  # fmt: skip

    def settings(self, task: str, arm: str) -> dict[str, Any]:
        """A run's settings for an arm on a task, without rate, seed and paths."""
        said = self.said.arms[arm]
        return merge_settings(self.said.base, {"plan": said.plan, "train": said.train})

    def identity(self, cell: RateCell) -> dict[str, Any]:
        """What a finished cell must agree with."""
        return {"settings": self.settings(cell.task, cell.arm), "rows": self.digests[cell.task]}

    def file(self, cell: RateCell) -> Path:
        """Where the results of a cell lie."""
        arm = cell.arm.replace(",", "").replace(" ", "-")
        return self.state / "cells" / cell.task / arm / f"{cell.rate:g}-seed{cell.seed}.json"

    def beside(self, cell: RateCell, by: str, budget: float) -> Path:
        """Where a training of a cell's arm and seed lies whose rate is not the grid's: one that ``auto`` found for that
        ``budget``, or the ``fixed`` one."""
        task, arm = self.file(cell).parts[-3:-1]
        chosen = f"auto-{budget:g}" if by == "auto" else by
        return self.state / "auto" / chosen / task / arm / f"seed{cell.seed}.json"

    def done(self, cell: RateCell) -> dict[str, Any] | None:
        """What a finished cell gave; None for one that is not done. Raises RunError for one of other settings."""
        file = self.file(cell)
        if not file.is_file():
            return None
        try:
            found: dict[str, Any] = read_json(file)
        except ValueError:
            raise RunError(f"{file}: a damaged file; remove it to run this cell again") from None
        if {key: found.get(key) for key in ("settings", "rows")} != self.identity(cell):
            raise RunError(f"{file}: a cell of other settings or rows; choose another state=, or remove it")
        return found

    def grid(self, task: str, arm: str) -> range:
        """The lattice indices of an arm's rates on a task: seven, and those that were added beyond an end because the
        best of the first seed lay there."""
        low, high = map(lattice_index, self.said.rates[self.said.arms[arm].rates])
        first, last = low, high
        while True:
            known = self._losses(task, arm, self.said.seeds[0], range(low, high + 1))
            if len(known) <= high - low:
                return range(low, high + 1)
            best = min(known, key=lambda index: known[index])
            if best == low and first - low < self.said.beyond:
                low -= 1
            elif best == high and high - last < self.said.beyond:
                high += 1
            else:
                return range(low, high + 1)

    def losses(self, task: str, arm: str, seed: int) -> dict[int, float]:
        """Lattice index -> validation loss, of the cells that are done; infinite where training diverged."""
        return self._losses(task, arm, seed, self.grid(task, arm))

    def _losses(self, task: str, arm: str, seed: int, grid: range) -> dict[int, float]:
        cells = {index: self.done(RateCell(task, arm, index, seed)) for index in grid}
        return {
            index: math.inf if cell["loss"] is None else cell["loss"]
            for index, cell in cells.items()
            if cell is not None
        }

    def missing(self) -> Iterator[RateCell]:
        """The cells that are not done, in an order in which what is done tells most: the first seed of every arm, its
        coarse grid before the rates between and those beyond an end; of the other seeds the best rates with the two
        beside them, then the rest."""
        first, *others = self.said.seeds
        for step in (2, 1):
            for task, arm in self.pairs:
                low, high = map(lattice_index, self.said.rates[self.said.arms[arm].rates])
                yield from self._open(RateCell(task, arm, index, first) for index in range(low, high + 1, step))
        for task, arm in self.pairs:
            while open_ones := list(self._open(RateCell(task, arm, at, first) for at in self.grid(task, arm))):
                yield from open_ones
        for seed in others:
            for task, arm in self.pairs:
                while open_ones := list(self._open(self._around_best(task, arm, seed))):
                    yield from open_ones
        for seed in others:
            for task, arm in self.pairs:
                yield from self._open(RateCell(task, arm, index, seed) for index in self.grid(task, arm))

    def _around_best(self, task: str, arm: str, seed: int) -> Iterator[RateCell]:
        """A seed's best cell so far and the two beside it; as long as it has none, those of the first seed."""
        grid = self.grid(task, arm)
        known = self.losses(task, arm, seed) or self.losses(task, arm, self.said.seeds[0])
        best = min(known, key=lambda index: known[index])
        return (RateCell(task, arm, index, seed) for index in (best, best - 1, best + 1) if index in grid)

    def _open(self, cells: Iterator[RateCell]) -> Iterator[RateCell]:
        return (cell for cell in cells if self.done(cell) is None)


def apart(overrides: Sequence[str], own: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The values of those ``key=value`` whose keys are among ``own``, by key; and the others as they are."""
    mine = [text for text in overrides if text.partition("=")[0] in own]
    return dict(text.split("=", 1) for text in mine), [text for text in overrides if text not in mine]


def load_rates_study(path: Path | str, overrides: Sequence[str] = ()) -> RatesStudy:
    """Read the study's YAML with ``key=value`` in place of its settings, and write its rows where they are missing.

    Paths in the file are relative to its folder. Raises ConfigError and DataError.
    """
    file = Path(path)
    mine, others = apart(overrides, ("state", "output", "phrasebank"))
    said = read_study(RatesConfig, file, others)
    said = said.model_copy(update={key: str(Path(value).absolute()) for key, value in mine.items()})
    study = RatesStudy(said, (file.parent / said.state).absolute(), (file.parent / said.output).absolute())
    write_rows(study.state / "rows", Path(said.phrasebank))
    return study
