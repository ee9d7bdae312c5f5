"""Two plans trained again with new seeds, and what they differ by.

The best of many scores is partly luck, which is why it is the best. So the two plans meet again, both with the same new
seeds, on the test rows where there are any.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from trimtab.config.run import RunConfig
from trimtab.errors import RunError
from trimtab.metrics import of_result
from trimtab.runs.events import Listener, Steps
from trimtab.runs.records import MetricsLine
from trimtab.runs.study_records import CellRecord, Confirmation, ConfirmedSeed
from trimtab.studies.ahead import bring
from trimtab.studies.cell import run_cell
from trimtab.studies.places import HERE, Place
from trimtab.studies.statistics import mean_interval


def confirm(
    arms: Mapping[str, RunConfig], seeds: int, folder: Path, listener: Listener, on: Place = HERE
) -> Confirmation:
    """Run ``arms`` (``mixed`` and ``uniform``) with ``seeds`` seeds after their own, each as a cell below ``folder``.

    Returns the scores of each seed by ``train.metric`` (the mean over the test sets), and the mean of mixed minus
    uniform with its 95 % interval (Student's t over the seeds; None for one seed). Raises as ``run_cell`` does.
    """
    config = arms["mixed"]
    metric, first = config.train.metric, config.train.seed + 1
    rows = []

    def cell(arm: RunConfig, seed: int) -> RunConfig:
        train = arm.train.model_copy(update={"seed": seed})
        return arm.model_copy(update={"train": train, "output": folder / arm.output.name / f"seed{seed}"})

    of_seeds = range(first, first + seeds)
    bring(on, [cell(arm, seed) for seed in of_seeds for arm in arms.values()], listener)
    for seed in of_seeds:
        scores: dict[str, float] = {}
        for kind, arm in arms.items():
            listener.stage(f"Confirming: {kind} with seed {seed}")
            result = run_cell(cell(arm, seed), Steps(listener))
            scores[kind] = score(result, metric)
            listener.note(f"{metric} {scores[kind]:.4f}")
        rows.append(ConfirmedSeed(seed=seed, **scores))
    difference = mean_interval([row.mixed - row.uniform for row in rows])
    return Confirmation(
        on=sorted(config.data.test) or ["validation"],
        rows=rows,
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
    )


def score(cell: CellRecord, metric: str) -> float:
    """``metric`` of a cell: the mean over its test sets, or that of its validation where it has none."""
    if cell.tests:
        return statistics.fmean(of_result(metric, result.figures) for result in cell.tests.values())
    return validation_score(cell.kept, metric)


def validation_score(line: MetricsLine | None, metric: str) -> float:
    """``metric`` of a validation. Raises RunError where it has none."""
    score = line.figure(metric) if line is not None else None
    if score is None:
        raise RunError(
            f"train.metric: {metric}: the validation has no figure of it, as where all answers are alike; choose "
            "another, or give more validation rows"
        )
    return score
