"""Hold ``train.learning_rate: auto`` against the grid of the study, with a fixed 5e-4 beside it.

    python studies/rates/auto_check.py studies/rates/study.yaml [budget=0.15] [tasks=orders] [seeds=1]
        [key=value ...]

For each setting (task, arm) whose grid is done for the first seed, and of which the other seeds (those of ``seeds``)
have the best rate of all with the two beside it: the final validation loss at the rate that ``auto`` finds, seed by
seed, less that of the grid's best rate (the one whose mean over the seeds is lowest, a choice made in hindsight).
``auto`` is close on a setting where the mean is at most 0.02 nats. Trials are
measured on the validation rows whose loss counts in the end, as the grid's best is chosen by them.

What the likely rates are made from (``trimtab.training.rate_prior``) must not be what they are held against: they may
be tuned on the task ``sentiment``, and ``orders`` (14 settings) is what counts. Finished trainings are kept in the
study's state, so the same command goes on; it writes ``auto.json`` into the output folder and prints a table.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trimtab.cli.exits import program

if TYPE_CHECKING:
    from rates_study import RatesStudy

CLOSE = 0.02
"""Nats a token."""
DIVERGED = 99.0
"""Nats a token: what stands for a training that diverged."""
FIXED = 5e-4
"""The rate that a run has whose YAML says none."""


def main(arguments: Sequence[str]) -> int:
    return program(arguments, __doc__, run)


def run(file: str, *overrides: str) -> None:
    from rates_study import apart, load_rates_study
    from trimtab.errors import RunError
    from trimtab.files import write_json
    from trimtab.runs.lock import locked

    own, others = apart(overrides, ("budget", "tasks", "seeds"))
    study = load_rates_study(file, others)
    budget, tasks = float(own.get("budget", "0.15")), own.get("tasks", "orders").split(",")
    if "seeds" in own:
        seeds = [int(seed) for seed in own["seeds"].split(",")]
        study = replace(study, said=study.said.model_copy(update={"seeds": seeds}))
    with locked(study.state / "auto" / ".lock"):
        rows = list(settings(study, budget, tasks))
    if not rows:
        raise RunError("no setting's grid is done for all seeds yet; go on with studies/rates/run.py first")
    for row in rows:
        print(
            f"{row['task']:10} {row['arm']:18} best {row['best_rate']:<8g} {row['best_loss']:.4f}   "
            f"auto {row['auto_rates']} {row['auto_over']:+.4f}   5e-4 {row['fixed_over']:+.4f}"
        )
    close = {name: sum(row[f"{name}_over"] <= CLOSE for row in rows) for name in ("auto", "fixed")}
    print(
        f"within {CLOSE} nats of the grid's best: auto {close['auto']}, 5e-4 {close['fixed']}, of {len(rows)} settings"
    )
    found = {"budget": budget, "close": close, "of": len(rows), "seeds": study.said.seeds, "settings": rows}
    write_json(study.output / "auto.json", found)


def settings(study: RatesStudy, budget: float, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A line for each setting whose grid is whole."""
    from rates_cell import Trainings
    from rates_study import RateCell, at_lattice

    trainings: Trainings | None = None
    for task, arm in study.pairs:
        losses = {seed: study.losses(task, arm, seed) for seed in study.said.seeds}
        best = _best(study.grid(task, arm), list(losses.values()))
        if task not in tasks or best is None:
            continue
        over: dict[str, list[float]] = {"auto": [], "fixed": []}
        rates: list[float] = []
        costs: list[float] = []
        for seed in study.said.seeds:
            cell = RateCell(task, arm, best, seed)
            for name in over:
                trainings = trainings or Trainings(study)
                found = _trained(study, trainings, cell, name, budget)
                over[name].append(_loss(found) - losses[seed][best])
                if name == "auto":
                    rates.append(found["rate"])
                    costs.append(found["cost"])
        yield {
            "task": task,
            "arm": arm,
            "best_rate": at_lattice(best),
            "best_loss": round(statistics.fmean(each[best] for each in losses.values()), 5),
            "auto_rates": rates,
            "auto_cost": max(costs),
            **{f"{name}_over": min(DIVERGED, round(statistics.fmean(values), 5)) for name, values in over.items()},
            "trained": list(_kept(study, cell, budget)),
        }


def _best(grid: range, seeds: Sequence[Mapping[int, float]]) -> int | None:
    """The rate with the lowest mean over the seeds; None where that is not known to be lower than those beside it, or
    where the first seed's grid is not whole."""
    known = [index for index in grid if all(index in losses for losses in seeds)]
    if len(seeds[0]) < len(grid) or not known:
        return None
    best = min(known, key=lambda index: statistics.fmean(losses[index] for losses in seeds))
    return best if all(index in known for index in (best - 1, best + 1) if index in grid) else None


def _trained(study: RatesStudy, trainings: Any, cell: Any, name: str, budget: float) -> dict[str, Any]:
    """The training of a setting with one seed at the rate of ``auto`` or the fixed one; kept once it is done."""
    from trimtab.files import read_json, write_json

    kept = study.beside(cell, name, budget)
    known = read_json(kept) if kept.is_file() else {}
    chosen = trainings.find_rate(cell, budget) if name == "auto" else None
    rate, likely = (FIXED, None) if chosen is None else (chosen.rate, chosen.likely)
    if (known.get("rate"), known.get("settings")) != (rate, study.identity(cell)["settings"]):
        known = {**trainings.run(cell, rate), "likely": likely, "cost": 0.0 if chosen is None else chosen.cost}
        write_json(kept, known)
        print(f"  {cell.arm} on {cell.task}, seed {cell.seed}, {name}: {rate:g}", file=sys.stderr, flush=True)
    found: dict[str, Any] = known
    return found


def _kept(study: RatesStudy, cell: Any, budget: float) -> Iterator[dict[str, Any]]:
    """Every training that is kept of a setting, also with seeds that are not asked for yet."""
    from trimtab.files import read_json

    for name in ("auto", "fixed"):
        for file in sorted(study.beside(cell, name, budget).parent.glob("seed*.json")):
            found = read_json(file)
            yield {"by": name, **{key: found[key] for key in ("seed", "rate", "loss", "cost")}}


def _loss(cell: dict[str, Any]) -> float:
    return math.inf if cell["loss"] is None else float(cell["loss"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
