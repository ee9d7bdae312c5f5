"""The pattern study: do magnitude and direction of a weight change together, or in place of each other?

    python studies/pattern/run.py studies/pattern/study.yaml

DoRA (arXiv 2402.09353, section 3.2) followed the query and value matrices of VL-BART through training and correlated
dM with dD over layers and checkpoints: -0.62 for full fine-tuning, +0.83 for LoRA, -0.31 for DoRA. This study trains
the same three from one start on one task, several seeds each, and again with one setting changed at a time. A *cell*
is one run; its checkpoints are analysed, and only the changes of each weight are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from trimtab.analysis.changes import analyse
from trimtab.config.read import build_config
from trimtab.config.resolve import plan_of, source_of
from trimtab.config.run import RunConfig, Section
from trimtab.config.study import merge_settings, read_study
from trimtab.errors import RunError
from trimtab.runs.events import Listener
from trimtab.runs.folder import RunFolder
from trimtab.studies.cell import digest, run_cell

AS_SET = "as set"
"""The level of the arms as the study sets them."""

_DIGITS = 8  # significant ones of a change, kept on disk


class PatternConfig(Section):
    """What a study's YAML may say. A later mapping is merged into an earlier one, as in `trimtab.config.study`."""

    base: dict[str, Any] = Field(description="What all runs have in common: the keys of a run's YAML.")
    arms: dict[str, dict[str, Any]] = Field(min_length=1, description="Name of a method -> what differs from base.")
    seeds: list[int] = Field(min_length=1, description="train.seed of the runs of an arm.")
    levels: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict,
        description="Name of a change -> for each arm that it is tried on, what differs from the arm.",
    )
    output: str | None = Field(
        None, min_length=1, description="The study's folder, relative to the YAML's; null: the file's name."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different seeds, got {self.seeds}")
        for level, arms in self.levels.items():
            for arm in arms:
                if arm not in self.arms:
                    raise ValueError(f"levels.{level}: '{arm}' is none of the arms ({', '.join(self.arms)})")
        if AS_SET in self.levels:
            raise ValueError(f"levels: '{AS_SET}' is what the arms themselves are called; choose another name")
        return self


class ChangePoint(NamedTuple):
    """One weight at one checkpoint."""

    kind: str
    block: int | None
    step: int | None
    norm: float
    delta_magnitude: float
    delta_direction: float


@dataclass(frozen=True)
class PatternCell:
    """One run of the study."""

    level: str
    arm: str
    seed: int
    config: RunConfig

    def __str__(self) -> str:
        return f"{self.arm}, {self.level}, seed {self.seed}"


@dataclass(frozen=True)
class PatternStudy:
    """A study that was read, with its runs."""

    said: PatternConfig
    folder: Path
    """Where its results go."""
    cells: tuple[PatternCell, ...]


def load_pattern_study(path: Path | str, overrides: Sequence[str] = (), *, out: Path | None = None) -> PatternStudy:
    """Read a study's YAML and make the configuration of each of its runs.

    Args:
        path: the YAML. Paths in it are relative to its folder.
        overrides: ``key.sub=value``, put into ``base`` in order.
        out: the study's folder in place of what the YAML says.

    Raises:
        ConfigError: the file is not what it should be, or a cell would not be a run; one line for each problem.
        PlanError: a cell's plan cannot be.
        RunError: the rows cannot be read.
    """
    file = Path(path)
    said = read_study(PatternConfig, file, overrides)
    folder = (out or file.parent / (said.output or file.stem)).absolute()
    return PatternStudy(said, folder, tuple(_cells(said, file, folder)))


def _cells(said: PatternConfig, file: Path, folder: Path) -> Iterator[PatternCell]:
    """The arms as set first, so that a study that is stopped early has its main result."""
    levels: dict[str, dict[str, dict[str, Any]]] = {AS_SET: {arm: {} for arm in said.arms}, **said.levels}
    for level, arms in levels.items():
        for seed in said.seeds:
            # Every checkpoint counts here, and none outlives its cell.
            fixed = {"train": {"seed": seed, "keep_checkpoints": 1_000_000}, "output": str(folder)}
            for arm, changed in arms.items():
                settings = said.base
                for more in (said.arms[arm], changed, fixed):
                    settings = merge_settings(settings, more)
                config = build_config(settings, file.parent, f"{file}: arm '{arm}', {level}")
                plan_of(config)
                # Named by what decides its results: a level that changes nothing for an arm shares the cell.
                where = folder / "cells" / f"{arm}-{seed}-{digest(config)}"
                yield PatternCell(level, arm, seed, config.model_copy(update={"output": where}))


def measure(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """What the study keeps of a run: the loss in its first line of metrics and over the last quarter of them, and the
    ``changes``, a `ChangePoint` for each weight and checkpoint."""
    losses = [row.loss for row in folder.read_metrics() if row.kind == "train" and row.loss is not None]
    last = losses[-max(1, len(losses) // 4) :]
    changes: dict[tuple[str, int | None], list[Any]] = {}
    for one in analyse(source_of(config), [folder.path], spectra=False):
        numbers = (one.norm, one.delta_magnitude, one.delta_direction)
        rounded = (float(f"{value:.{_DIGITS}g}") for value in numbers)
        # The adapter that the run ended with has the step of the last checkpoint, which comes first.
        changes.setdefault((one.module, one.step), [*ChangePoint(one.kind, one.block, one.step, *rounded)])
    return {"first_loss": losses[0], "last_loss": sum(last) / len(last), "changes": list(changes.values())}


def run_cells(
    cells: Sequence[PatternCell], listener: Listener, failed: list[tuple[PatternCell, str]]
) -> Iterator[tuple[PatternCell, dict[str, Any]]]:
    """Each cell with its results (``cell.json``), run where it is not done yet.

    A cell that fails is put into ``failed`` with the reason, and the others go on; another call tries it again. Raises
    Interrupted when the user stops it; what is done stays.
    """
    for number, cell in enumerate(cells, 1):
        listener.stage(f"Cell {number} of {len(cells)}: {cell}")
        try:
            yield cell, run_cell(cell.config, listener, measure=partial(measure, cell.config)).plain()
        except RunError as error:
            failed.append((cell, str(error)))
            listener.note(f"failed: {error}")
