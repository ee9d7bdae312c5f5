"""What the cells of the pattern study say together: correlations with intervals over seeds, as JSON and CSV.

``pattern.json`` holds correlations and means, ``pattern.csv`` a line for each weight at each checkpoint of each run.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pattern_study import ChangePoint, PatternCell, PatternStudy
from trimtab.analysis.correlation import centred, pearson
from trimtab.files import write_json, write_text
from trimtab.studies.statistics import mean_interval

COLUMNS = ("level", "arm", "seed", *ChangePoint._fields)

VIEWS = {
    "all": "over layers and checkpoints, as in the paper",
    "ranks": "the same of ranks (Spearman), where no single weight decides",
    "relative": "dM as a share of the norm of the weight's rows, over layers and checkpoints",
    "layers": "between layers: each checkpoint's mean taken off",
    "time": "over time: each layer's mean taken off",
    "size": "between layers at the last checkpoint: dD with 1 / norm^2 of the rows before training",
}


def summarise(results: Sequence[tuple[PatternCell, Mapping[str, Any]]]) -> dict[str, Any]:
    """The study's numbers.

    - ``cells``: a line for each run: what it trained, for how long, its loss.
    - ``correlations``: for each level, arm, kind of projection (null: all of them as one cloud of points) and view:
      one correlation of dM and dD per seed, their mean and its 95 % interval (`mean_correlation`).
    - ``changes``: mean dM and dD over layers and seeds at each checkpoint.
    """
    groups: dict[tuple[str, str], list[list[ChangePoint]]] = defaultdict(list)
    for cell, result in results:
        groups[cell.level, cell.arm].append([ChangePoint(*one) for one in result["measured"]["changes"]])
    correlations, changes = [], []
    for (level, arm), runs in groups.items():
        kinds = list(dict.fromkeys(point.kind for point in runs[0]))
        for kind in [*kinds, None] if len(kinds) > 1 else kinds:
            clouds = [[point for point in run if kind in (None, point.kind)] for run in runs]
            for view in VIEWS:
                values = [value for cloud in clouds if (value := _correlation(cloud, view)) is not None]
                where = {"level": level, "arm": arm, "kind": kind, "view": view}
                correlations.append({**where, "per_seed": values, **mean_correlation(values)})
            for step in dict.fromkeys(point.step for point in clouds[0]):
                there = [point for cloud in clouds for point in cloud if point.step == step]
                changes.append(
                    {"level": level, "arm": arm, "kind": kind, "step": step, "weights": len(there)}
                    | {"delta_magnitude": math.fsum(point.delta_magnitude for point in there) / len(there)}
                    | {"delta_direction": math.fsum(point.delta_direction for point in there) / len(there)}
                )
    return {
        "cells": [_line(cell, result) for cell, result in results],
        "correlations": correlations,
        "changes": changes,
    }


def _correlation(cloud: Sequence[ChangePoint], view: str) -> float | None:
    """Pearson's correlation over the points of one run, seen in one of ``VIEWS``."""
    if view == "size":
        last = [point for point in cloud if point.step == cloud[-1].step]
        return pearson([_share(1, point.norm**2) for point in last], [point.delta_direction for point in last])
    magnitudes, directions = [point.delta_magnitude for point in cloud], [point.delta_direction for point in cloud]
    if view == "ranks":
        from scipy.stats import rankdata

        return pearson(rankdata(magnitudes).tolist(), rankdata(directions).tolist())
    if view == "relative":
        magnitudes = [_share(point.delta_magnitude, point.norm) for point in cloud]
    if view in ("layers", "time"):
        groups = [(point.kind, point.step if view == "layers" else point.block) for point in cloud]
        magnitudes, directions = centred(magnitudes, groups), centred(directions, groups)
    return pearson(magnitudes, directions)


def mean_correlation(values: Sequence[float]) -> dict[str, float | None]:
    """The ``mean`` of independent correlations and the ends of its 95 % interval, ``low`` and ``high``.

    A correlation near 1 can err to one side only, so mean and interval are Student's of Fisher's ``z = atanh r``, which
    is close to normal, turned back. None where there is nothing to say: no values; for the ends, one.
    """
    if not values:
        return {"mean": None, "low": None, "high": None}
    most = 1 - 1e-12  # keeps z finite where the points lie on a line
    interval = mean_interval([math.atanh(max(-most, min(most, value))) for value in values])
    ends = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {key: None if z is None else math.tanh(z) for key, z in ends.items()}


def _share(value: float, of: float) -> float:
    return value / of if of else 0.0


def _line(cell: PatternCell, result: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("trainable_parameters", "steps", "training_seconds", "total_seconds", "peak_memory_gib", "precision")
    measured = result["measured"]
    return (
        {"level": cell.level, "arm": cell.arm, "seed": cell.seed}
        | {key: result[key] for key in kept}
        | {"first_loss": measured["first_loss"], "last_loss": measured["last_loss"]}
    )


def write_results(study: PatternStudy, results: Sequence[tuple[PatternCell, Mapping[str, Any]]]) -> None:
    """Write both files into the study's folder (there is at least one result); the JSON keeps what the YAML said."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell, result in results:
        writer.writerows([cell.level, cell.arm, cell.seed, *change] for change in result["measured"]["changes"])
    write_text(study.folder / "pattern.csv", text.getvalue())
    machine = {key: results[-1][1][key] for key in ("machine", "versions")}
    write_json(
        study.folder / "pattern.json",
        {"study": study.said.model_dump(), "views": VIEWS, **summarise(results), **machine},
    )
