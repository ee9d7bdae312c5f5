"""What the cells of a memory study say together: curves with intervals over seeds, as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memory_study import CONTENDERS, Arm, MemoryStudy
from trimtab.files import write_json, write_text
from trimtab.machine import describe_machine, versions
from trimtab.studies.statistics import mean_interval

REFERENCE = "lora"
"""Whom the others are compared with, at the same budget and seed by seed."""
LEARNT = 0.99
"""The share of characters from which on the pairs count as learnt."""

_COLUMNS = ("contender", "budget", "parameters", "learning_rate", "seed", "part", "step", "loss", "accuracy")
Results = Mapping[Arm, tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def area(curve: Sequence[Mapping[str, Any]]) -> float:
    """The mean accuracy over the points after the start: the area under the curve, as a share of its box."""
    after: list[float] = [point["accuracy"] for point in curve if point["step"] > 0]
    return sum(after) / len(after)


def steps_to(curve: Sequence[Mapping[str, Any]], accuracy: float) -> int | None:
    """The step of the first point that reaches ``accuracy``; None if none does."""
    return next((point["step"] for point in curve if point["accuracy"] >= accuracy), None)


def summarise(study: MemoryStudy, results: Results) -> dict[str, Any]:
    """The study's numbers: its settings, and for each arm

    - ``candidates``: the area under the curve of each learning rate of the search, and the one chosen; ``at_edge``
      where that is the smallest or the largest (a wider search might have found a better one);
    - ``curve``: at each step the accuracy's mean over seeds, the lowest and the highest;
    - ``area``, ``final``: mean and interval over seeds; ``steps_to_learnt``: of each seed, None if it never was;
    - ``against_reference``: the difference in area to LoRA at the same budget, its mean and interval over seeds, which
      share their pairs and their order; None for LoRA itself.
    """
    arms = []
    for arm, (search, curves) in results.items():
        points = zip(*(run["curve"] for run in curves), strict=True)
        rates = sorted(one["learning_rate"] for one in search)
        rate = curves[0]["learning_rate"]
        edge = None if len(rates) < 2 else {rates[0]: "smallest", rates[-1]: "largest"}.get(rate)
        arms.append(
            {
                "contender": arm.contender,
                "label": CONTENDERS[arm.contender].label,
                "budget": arm.budget,
                "parameters": curves[0]["parameters"],
                "plan": curves[0]["plan"],
                "learning_rate": rate,
                "at_edge": edge,
                "candidates": [_candidate(one) for one in search],
                "seeds": [run["seed"] for run in curves],
                "seconds": sum(run["seconds"] for run in [*search, *curves]),
                "diverged": sum(run["diverged"] is not None for run in curves),
                "curve": [_over_seeds(same) for same in points],
                "area": mean_interval([area(run["curve"]) for run in curves]).plain(),
                "final": mean_interval([run["curve"][-1]["accuracy"] for run in curves]).plain(),
                "steps_to_learnt": [steps_to(run["curve"], LEARNT) for run in curves],
                "against_reference": _against(curves, results.get(Arm(REFERENCE, arm.budget)), arm),
            }
        )
    return {
        "study": study.model_dump(mode="json"),
        "learnt": LEARNT,
        "cells": study.size,
        "seconds": round(sum(arm["seconds"] for arm in arms), 1),
        "machine": describe_machine(),
        "versions": versions(),
        "arms": arms,
    }


def _over_seeds(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # No interval: where curves jump from nothing to all, that of a few seeds would be all of the axis.
    accuracies = [point["accuracy"] for point in points]
    return {
        "step": points[0]["step"],
        "mean": sum(accuracies) / len(accuracies),
        "lowest": min(accuracies),
        "highest": max(accuracies),
    }


def _candidate(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "learning_rate": result["learning_rate"],
        "area": area(result["curve"]),
        "final": result["curve"][-1]["accuracy"],
        "diverged": result["diverged"] is not None,
    }


def _against(
    curves: Sequence[Mapping[str, Any]], reference: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None, arm: Arm
) -> dict[str, Any] | None:
    if reference is None or arm.contender == REFERENCE:
        return None
    pairs = zip(curves, reference[1], strict=True)
    return mean_interval([area(one["curve"]) - area(other["curve"]) for one, other in pairs]).plain()


def write_results(out: Path, study: MemoryStudy, results: Results) -> dict[str, Any]:
    """Write ``memorize.json`` and ``memorize.csv`` into ``out``; return what the first holds."""
    summary = summarise(study, results)
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for search, curves in results.values():
        for part, runs in (("search", search), ("curve", curves)):
            for run in runs:
                shared = {key: run[key] for key in _COLUMNS if key in run}
                writer.writerows({**shared, "part": part, **point} for point in run["curve"])
    write_text(out / "memorize.csv", text.getvalue())
    write_json(out / "memorize.json", summary)
    return summary
