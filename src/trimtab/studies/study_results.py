"""What a study says so far: its cells gathered from disk, means with intervals, paired comparisons.

results.json    everything, so that the page and every number on it can be made again
results.csv     a line for each run and test set
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trimtab.files import write_json, write_text
from trimtab.metrics import KINDS, compared, main_metric
from trimtab.studies.cell import finished_cell
from trimtab.studies.compare import chosen_runs
from trimtab.studies.statistics import holm, mean_interval, paired_difference
from trimtab.studies.study_cells import Cell, Study

_COSTS = ("trainable_parameters", "training_seconds", "peak_memory_gib")
_FACTS = (*_COSTS, "steps", "train_rows", "train_tokens", "total_seconds", "precision")
_FIGURES = tuple(metric.name for metric in compared())
_BESIDE = [metric for metric in compared() if metric not in map(main_metric, KINDS)]
"""Metrics that a line gives beside the one it compares."""


def write_results(study: Study, failed: Sequence[tuple[Cell, str]] = ()) -> dict[str, Any]:
    """Write both files into the study's folder; return what ``results.json`` holds. ``failed``: as `compare` gives."""
    results = gather(study, failed)
    write_json(study.folder / "results.json", results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "arm", "seed", "learning_rate", "test", "rows", *_FIGURES, *_FACTS])
    for run in results["runs"]:
        for name, found in run["tests"].items():
            figures = [found.get(key, "") for key in _FIGURES]
            facts = [run[key] for key in _FACTS]
            writer.writerow(
                [run["task"], run["arm"], run["seed"], run["learning_rate"], name, found["rows"], *figures, *facts]
            )
    write_text(study.folder / "results.csv", text.getvalue())
    return results


def gather(study: Study, failed: Sequence[tuple[Cell, str]] = ()) -> dict[str, Any]:
    """Everything that is known of a study, ready for JSON; what is not done is listed under ``missing``."""
    said = study.said
    searches, runs, missing = [], [], []
    machines: list[dict[str, Any]] = []
    for task in said.tasks:
        for arm in said.arms:
            chosen = chosen_runs(study, task, arm)
            cells = chosen if chosen is not None else study.runs(task, arm, None)
            for cell in (*study.searches(task, arm), *cells):
                found = finished_cell(cell.config) if cell.searching or chosen is not None else None
                here = {"task": task, "arm": arm, "seed": cell.seed, "learning_rate": cell.learning_rate}
                if found is None:
                    missing.append({**here, "searching": cell.searching})
                    continue
                if (machine := {**found["machine"], "versions": found["versions"]}) not in machines:
                    machines.append(machine)
                facts = {key: found[key] for key in _FACTS}
                if cell.searching:
                    taken = chosen is not None and cell.learning_rate == chosen[0].learning_rate
                    searches.append({**here, "taken": taken, "validation": found["kept"], **facts})
                else:
                    runs.append({**here, **facts, "tests": found["tests"]})
    return {
        "title": study.title,
        "question": said.question,
        "file": study.file.name,
        "reference": said.reference,
        "seeds": list(said.seeds),
        "search": said.search.model_dump(mode="json") if said.search else None,
        "arms": [{"arm": arm, "series": study.series(arm)} for arm in said.arms],
        "summary": _summary(study, runs),
        "searches": searches,
        "runs": runs,
        "missing": missing,
        "failed": [
            {"task": cell.task, "arm": cell.arm, "seed": cell.seed, "searching": cell.searching, "reason": reason}
            for cell, reason in failed
        ],
        "machines": machines,
        "said": said.model_dump(mode="json"),
    }


def _summary(study: Study, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each arm on each test set of each task: means over seeds, and the comparison with the reference."""
    lines: list[dict[str, Any]] = []
    for task in study.said.tasks:
        by_arm = {arm: [run for run in runs if (run["task"], run["arm"]) == (task, arm)] for arm in study.said.arms}
        tests = dict.fromkeys(name for of_arm in by_arm.values() for run in of_arm for name in run["tests"])
        for test in tests:
            for arm, mine in by_arm.items():
                if not mine:
                    continue
                found = [run["tests"][test] for run in mine]
                measure = main_metric(found[0]["kind"]).name
                line = {
                    "task": task,
                    "test": test,
                    "arm": arm,
                    "measure": measure,
                    "rows": found[0]["rows"],
                    "majority": (found[0].get("majority") or {}).get("accuracy"),
                    "chance": found[0].get("chance"),
                    "seeds": [run["seed"] for run in mine],
                    "learning_rate": mine[0]["learning_rate"] if mine[0]["steps"] else None,
                    **asdict(mean_interval([one[measure] for one in found])),
                    **{metric.name: _spread(found, metric.name) for metric in _BESIDE},
                    "costs": {key: asdict(mean_interval([run[key] for run in mine])) for key in _COSTS},
                    "against": (other := study.against(arm)),
                    "difference": _difference(mine, by_arm[other], test) if other is not None else None,
                }
                lines.append(line)
    compared = [line["difference"] for line in lines if line["difference"] is not None]
    for difference, p in zip(compared, holm([one["p"] for one in compared]), strict=True):
        difference["p_holm"] = p
    return lines


def _spread(tests: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The mean of a metric with its interval; None where these test results do not have it."""
    return asdict(mean_interval([test[name] for test in tests])) if all(name in test for test in tests) else None


def _difference(
    mine: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], test: str
) -> dict[str, Any] | None:
    """The paired comparison over the seeds that both have; None where nothing can be paired."""
    right = [{run["seed"]: run["tests"].get(test, {}).get("correct") for run in of_arm} for of_arm in (mine, reference)]
    if not all(right) or any(correct is None for of_arm in right for correct in of_arm.values()):
        return None
    if all(run["steps"] == 0 for run in mine) or all(run["steps"] == 0 for run in reference):
        pair = [list(of_arm.values()) for of_arm in right]  # the one run of an arm that is not trained
    else:
        both = [seed for seed in right[0] if seed in right[1]]
        if not both:
            return None
        pair = [[of_arm[seed] for seed in both] for of_arm in right]
    return asdict(paired_difference(*pair))
