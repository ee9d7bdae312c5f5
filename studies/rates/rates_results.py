"""What the cells of the study say together: the best rate of each arm with its interval, and how arms differ in it.

rates.json    everything that the page shows        rates.csv    a line for each cell
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rates_study import RateCell, RatesConfig, RatesStudy, at_lattice, lattice_index
from trimtab.errors import RunError
from trimtab.files import read_json, write_json, write_text
from trimtab.studies.statistics import mean_interval

_COLUMNS = ("task", "arm", "rate", "seed", "loss", "exact", "trained", "seconds", "processor_seconds")

QUESTIONS: Mapping[str, Sequence[tuple[str, str]]] = {
    "Is LoRA's best rate ten times that of full fine-tuning?": [
        (f"{name} r8", "full") for name in ("LoRA", "DoRA", "MoRA")
    ],
    "Does it move with the rank, where alpha is twice the rank?": [
        (f"{name} r{rank}", f"{name} r8") for name in ("LoRA", "DoRA", "MoRA") for rank in (1, 64)
    ],
    "Does it move with the rank, where alpha is fixed at 16?": [
        ("LoRA r1 alpha 16", "LoRA r8"),
        ("LoRA r64 alpha 16", "LoRA r8"),
    ],
    "Does it move with alpha, at one rank?": [
        ("LoRA r8 alpha 64", "LoRA r8"),
        ("LoRA r1 alpha 16", "LoRA r1"),
        ("LoRA r64 alpha 16", "LoRA r64"),
    ],
    "Does it move with the number of steps?": [
        (f"{name}, {steps} steps", name) for name in ("LoRA r8", "full") for steps in (8, 96)
    ],
}
"""Question -> pairs of arms whose best rates it compares."""


def best_place(losses: Mapping[int, float]) -> float:
    """Where on the lattice the loss is lowest: the bottom of the parabola through the lowest loss and its neighbours,
    and the lowest itself where it has no two neighbours that are numbers."""
    best = min(losses, key=lambda index: losses[index])
    low, middle, high = (losses.get(best + step, math.inf) for step in (-1, 0, 1))
    if not (math.isfinite(low) and math.isfinite(high)) or low + high <= 2 * middle:
        return float(best)
    return best + (low - high) / (2 * (low - 2 * middle + high))


def _tells_its_best(losses: Mapping[int, float], grid: range) -> bool:
    """Whether the lowest loss that a seed has so far is known to be lower than those of the rates beside it."""
    if not losses:
        return False
    best = min(losses, key=lambda index: losses[index])
    return all(index in losses for index in (best - 1, best + 1) if index in grid)


def arm_results(study: RatesStudy, task: str, arm: str) -> dict[str, Any]:
    """What is known of an arm on a task. ``best`` is the best rate over the seeds that tell theirs; None where there is
    no such seed, or where in one of them it is at an edge of the grid (``edge``), so that nothing is said."""
    grid = study.grid(task, arm)
    seeds = {seed: study.losses(task, arm, seed) for seed in study.said.seeds}
    telling = {seed: losses for seed, losses in seeds.items() if _tells_its_best(losses, grid)}
    edge = any(min(losses, key=lambda at: losses[at]) in (grid[0], grid[-1]) for losses in telling.values())
    places = {seed: best_place(losses) for seed, losses in telling.items()}
    # Of seeds that are done in part the curve would jump where they end.
    whole = [losses for losses in seeds.values() if len(losses) == len(grid)]
    curve = []
    for index in grid:
        values = [losses[index] for losses in whole or telling.values() or seeds.values() if index in losses]
        finite = [value for value in values if math.isfinite(value)]
        mean = mean_interval(finite).plain() if finite and len(finite) == len(values) else None
        curve.append(
            {"rate": at_lattice(index), "loss": mean, "seeds": len(values), "diverged": len(values) - len(finite)}
        )
    return {
        "task": task,
        "arm": arm,
        "cells": sum(map(len, seeds.values())),
        "of": len(grid) * len(study.said.seeds),
        "edge": edge,
        "places": {str(seed): round(place, 4) for seed, place in places.items()},
        "best": None if edge or not places else _rates(list(places.values())),
        "curve": curve,
    }


def _rates(places: Sequence[float]) -> dict[str, Any]:
    """Rates from places on the lattice: the mean (geometric) and its 95 % interval over seeds."""
    known = mean_interval(list(places))
    ends = {"low": known.low, "high": known.high}
    rates = {name: None if place is None else at_lattice(place) for name, place in ends.items()}
    return {"rate": at_lattice(known.mean), "seeds": known.n, **rates}


def compared(arms: Mapping[tuple[str, str], Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """For every question and pair of arms: how many times the one's best rate is the other's, seed by seed."""
    found = []
    for question, pairs in QUESTIONS.items():
        for task in tasks:
            for one, other in pairs:
                if (task, one) not in arms or (task, other) not in arms:
                    continue
                mine, theirs = arms[task, one], arms[task, other]
                both = [seed for seed in mine["places"] if seed in theirs["places"]]
                ratio = None
                if both and not (mine["edge"] or theirs["edge"]):
                    ratio = _rates([mine["places"][seed] - theirs["places"][seed] for seed in both])
                why = "a best rate is at the edge of its grid" if mine["edge"] or theirs["edge"] else "not done yet"
                found.append(
                    {"question": question, "task": task, "arm": one, "against": other, "ratio": ratio}
                    | ({} if ratio else {"why": why})
                )
    return found


def write_results(study: RatesStudy) -> dict[str, Any]:
    """Write both files; return what ``rates.json`` holds."""
    arms = {(task, arm): arm_results(study, task, arm) for task, arm in study.pairs}
    cells = [
        found
        for task, arm in study.pairs
        for seed in study.said.seeds
        for index in study.grid(task, arm)
        if (found := study.done(RateCell(task, arm, index, seed))) is not None
    ]
    results = {
        "said": study.said.model_dump(mode="json", exclude={"state", "output", "phrasebank"}),
        "done": len(cells),
        "of": sum(known["of"] for known in arms.values()),
        "processor_hours": round(sum(cell["processor_seconds"] for cell in cells) / 3600, 2),
        "arms": list(arms.values()),
        "compared": compared(arms, study.said.tasks),
        "rows": study.digests,
        "versions": cells[-1]["versions"] if cells else {},
    }
    write_json(study.output / "rates.json", results)
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    write_text(study.output / "rates.csv", text.getvalue())
    return results


def restore(study: RatesStudy) -> int:
    """Write what is published in the study's output folder into its state, where the state lacks it, as if it had been
    trained there; returns how many trainings that were. So a study goes on on another machine.

    Of a cell the losses of its steps are not published, and nothing reads them. Raises RunError where the published
    results are of other settings or rows than the study.
    """
    file = study.output / "rates.json"
    if not file.is_file():
        raise RunError(f"{file}: no published results to go on from; leave --restore away to begin anew")
    published = read_json(file)
    before = replace(study, said=RatesConfig.model_validate(published["said"]))
    restored = 0
    for cell, at, found in [*_published_cells(study), *_published_beside(study)]:
        if at.is_file() or (cell.task, cell.arm) not in study.pairs:
            continue
        theirs = {"settings": before.settings(cell.task, cell.arm), "rows": published["rows"][cell.task]}
        if theirs != study.identity(cell):
            raise RunError(
                f"{file}: {cell} was trained with other settings or rows than those of the study; choose another "
                "output=, or leave --restore away to begin anew"
            )
        known = {"task": cell.task, "arm": cell.arm, "seed": cell.seed, **theirs, "versions": published["versions"]}
        write_json(at, {**known, **found})
        restored += 1
    return restored


def _published_cells(study: RatesStudy) -> Iterator[tuple[RateCell, Path, dict[str, Any]]]:
    """Each cell of ``rates.csv``, its file, and what it gave."""
    with (study.output / "rates.csv").open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines):
            cell = RateCell(line["task"], line["arm"], lattice_index(float(line["rate"])), int(line["seed"]))
            numbers = {name: float(line[name]) for name in ("exact", "seconds", "processor_seconds")}
            loss = float(line["loss"]) if line["loss"] else None
            yield cell, study.file(cell), {"rate": cell.rate, "loss": loss, "trained": int(line["trained"]), **numbers}


def _published_beside(study: RatesStudy) -> Iterator[tuple[RateCell, Path, dict[str, Any]]]:
    """Each training of ``auto.json`` at a rate that is not the grid's, its file, and what it gave."""
    file = study.output / "auto.json"
    auto = read_json(file) if file.is_file() else {"settings": []}
    for setting in auto["settings"]:
        for found in setting["trained"]:
            cell = RateCell(setting["task"], setting["arm"], lattice_index(setting["best_rate"]), found["seed"])
            yield cell, study.beside(cell, found["by"], auto["budget"]), {k: found[k] for k in ("rate", "loss", "cost")}
