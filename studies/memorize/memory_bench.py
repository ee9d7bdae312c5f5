"""The memory study: who learns random identifiers by heart, at equal cost (MoRA, arXiv 2405.12130, section 3).

    memorize(MemoryStudy(), Path("memorize"))

Every arm (a method at a budget) first tries its learning rates on the pairs of one seed; the one with the largest area
under its curve is then run on the pairs of other seeds, and only these runs are reported. Every method tries as many
rates. All that a method trains is on the same matrices, every linear layer but the head.

The folder:

    study.json       the task that its cells share
    cells/           one JSON for each cell, written when it is done; it is never run again
    memorize.json    the whole result; memorize.csv has a line for each point of each curve
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from budgets import matched_plan
from memory_cell import CurvePoint, train_cell
from memory_results import area, write_results
from memory_study import CONTENDERS, Arm, MemoryCell, MemoryStudy
from trimtab.errors import STOPS, ConfigError, Interrupted, RunError
from trimtab.files import read_json, write_json
from trimtab.machine import device
from trimtab.models.locate import locate
from trimtab.models.model_files import load_tokenizer
from trimtab.runs.load import load_fitting
from trimtab.runs.lock import locked
from trimtab.surgery.attach import attach, detach
from trimtab.surgery.plan import ALL_LINEAR, Plan, Rule


class MemoryListener:
    """Receives what happens in a study. Every method does nothing here; override those of interest."""

    def planned(self, study: MemoryStudy, parameters: Mapping[Arm, int]) -> None:
        """Before the first cell: what each arm trains."""

    def began(self, cell: MemoryCell) -> None:
        """``cell`` starts to train."""

    def evaluated(self, cell: MemoryCell, point: CurvePoint) -> None:
        """A point was added to the curve of ``cell``."""

    def ended(self, cell: MemoryCell, result: Mapping[str, Any], fresh: bool) -> None:
        """``cell`` is done; ``fresh``: now, and not in an earlier call."""


def memorize(study: MemoryStudy, out: Path, listener: MemoryListener | None = None) -> dict[str, Any]:
    """Run what is missing of ``study`` in the folder ``out`` and return what ``memorize.json`` holds.

    Raises:
        ConfigError, PlanError: settings that this model does not allow; before anything is trained.
        RunError: the folder holds cells of another task, or a damaged one; another process is at it.
        Interrupted: by the user; finished cells are kept.
    """
    folder = StudyFolder(out, study)
    chosen: dict[Arm, float] = {}
    with folder.claimed():
        try:
            bench = _Bench(study, folder, listener or MemoryListener())
            bench.listener.planned(study, bench.parameters)
            for arm in study.arms:
                tried = {cell.learning_rate: bench.result(cell) for cell in study.candidates(arm)}
                chosen[arm] = max(tried, key=lambda rate: _merit(tried[rate]))
            # Seed by seed, so that a study that is cut off has compared all arms on some.
            for cells in zip(*(study.curves(arm, chosen[arm]) for arm in study.arms), strict=True):
                for cell in cells:
                    bench.result(cell)
        except STOPS as stop:
            raise Interrupted.by(
                stop,
                f"interrupted: {folder.done()} finished cells of {study.size} are kept in {out}; the same command goes "
                "on with the others",
            ) from None
        return write_results(out, study, {arm: folder.results(arm, chosen[arm]) for arm in study.arms})


def _merit(result: Mapping[str, Any]) -> tuple[float, float]:
    """The area under the curve; between equal ones, such as two that learnt nothing, the lower last loss."""
    last = result["curve"][-1]["loss"]
    return area(result["curve"]), float("-inf") if last is None else -last


@dataclass(frozen=True)
class StudyFolder:
    """The files of a study."""

    path: Path
    study: MemoryStudy

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Write down the task and keep other processes out.

        Raises RunError where the folder holds another task's cells, or something else, or a process is at work in it.
        """
        file = self.path / "study.json"
        if not file.is_file() and self.path.is_dir() and any(self.path.iterdir()):
            raise RunError(f"{self.path}: holds something other than a memory study; choose another output")
        with locked(self.path / "cells" / ".lock"):
            here, there = self.study.task, _read(file) if file.is_file() else {}
            differ = [key for key in here if key not in there or there[key] != here[key]]
            if differ and self.done():
                said = ", ".join(f"{key} {there.get(key)} there, {here[key]} asked for" for key in differ)
                raise RunError(
                    f"{file}: its cells are of another task: {said}. Ask for the same, or choose another output"
                )
            write_json(file, here)
            yield

    def file(self, cell: MemoryCell) -> Path:
        return self.path / "cells" / f"{cell}.json"

    def read(self, cell: MemoryCell) -> dict[str, Any] | None:
        """The cell's result, if it is done."""
        return _read(self.file(cell)) if self.file(cell).is_file() else None

    def done(self) -> int:
        """How many cells are on disk."""
        return len(list((self.path / "cells").glob("*.json")))

    def results(self, arm: Arm, learning_rate: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The results of the search and of the curves of ``arm``; all of them are done."""
        cells = self.study.candidates(arm), self.study.curves(arm, learning_rate)
        search, curves = ([_read(self.file(cell)) for cell in some] for some in cells)
        return search, curves


def _read(file: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = read_json(file)
    except ValueError as error:
        raise RunError(f"{file}: a damaged file ({error}); remove it, and its cell is run again") from None
    return result


class _Bench:
    """The model, the plans, and the way from a cell to its result."""

    def __init__(self, study: MemoryStudy, folder: StudyFolder, listener: MemoryListener) -> None:
        self.study, self.folder, self.listener = study, folder, listener
        source = locate(study.model)
        self.tokenizer = load_tokenizer(source)
        self.model: Any = load_fitting(source, study.precision)
        keep_blocks(self.model, study.blocks)
        self.model.to(device())
        self.plans = {arm: self._plan(arm) for arm in study.arms}
        self.parameters = {arm: _count(self.model, plan) for arm, plan in self.plans.items()}

    def _plan(self, arm: Arm) -> Plan:
        contender = CONTENDERS[arm.contender]
        if arm.budget is None:
            return Plan([Rule(match=ALL_LINEAR, method=contender.method, **contender.options)])
        return matched_plan(self.model, contender.method, contender.options, arm.budget)

    def result(self, cell: MemoryCell) -> dict[str, Any]:
        """What ``cell`` gave, now or before."""
        done = self.folder.read(cell)
        if done is not None:
            self.listener.ended(cell, done, False)
            return done
        self.listener.began(cell)
        plan = self.plans[cell.arm]
        result = {
            "contender": cell.arm.contender,
            "budget": cell.arm.budget,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "parameters": self.parameters[cell.arm],
            "plan": [rule.describe() for rule in plan.rules],
            **train_cell(
                self.model,
                self.tokenizer,
                plan,
                self.study,
                learning_rate=cell.learning_rate,
                seed=cell.seed,
                evaluated=lambda point: self.listener.evaluated(cell, point),
            ),
        }
        write_json(self.folder.file(cell), result)
        self.listener.ended(cell, result, True)
        return result


def _count(model: Any, plan: Plan) -> int:
    """How many numbers ``plan`` trains."""
    count = attach(model, plan).trainable_parameters
    detach(model)
    return count


def keep_blocks(model: Any, count: int | None) -> None:
    """Drop all but the first ``count`` blocks of ``model`` in place; None keeps all.

    Raises ConfigError if it has not as many, or none that can be told.
    """
    if count is None:
        return
    decoder = model.get_decoder()
    blocks = next((child for child in decoder.children() if isinstance(child, torch.nn.ModuleList)), None)
    if blocks is None or count > len(blocks):
        has = "no list of blocks" if blocks is None else f"{len(blocks)} blocks"
        raise ConfigError(f"blocks: expected at most what the model has, got {count}; it has {has}")
    del blocks[count:]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
