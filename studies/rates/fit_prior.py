"""What the likely rates (``trimtab.training.rate_prior``) are made from: the study's best rates on one task.

    python studies/rates/fit_prior.py studies/rates/study.yaml [task=sentiment] [key=value ...]

For each method a line through the best rates of its arms: ``log rate = log base - power * log size``, where the size is
alpha / 16, or rank / 8 for a method without alpha. All methods share one power, for their own do not differ by more
than they are uncertain. An arm's best rate is the bottom of a parabola through all rates whose loss, a mean over the
seeds, is within ``NEAR`` of the lowest, and through the two beside that: one rate by itself may be lucky. Prints the
bases and the power; what is printed is copied into that module by hand.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trimtab.cli.exits import program

if TYPE_CHECKING:
    from rates_study import RatesStudy

NEAR = 0.15
"""Nats a token."""


def main(arguments: Sequence[str]) -> int:
    return program(arguments, __doc__, run)


def run(file: str, *overrides: str) -> None:
    from rates_study import apart, load_rates_study
    from trimtab.errors import RunError

    own, others = apart(overrides, ("task",))
    task, study = own.get("task", "sentiment"), load_rates_study(file, others)
    found = bests(study, task)
    if not found:
        raise RunError(f"no arm has three rates on {task} yet; go on with studies/rates/run.py first")
    for method, arms in found.items():
        for arm, (size, rate) in arms.items():
            print(f"{method}: {arm:18} size {size:<7g} best {rate:.2e}")
    bases, power = lines({method: list(arms.values()) for method, arms in found.items()})
    print(", ".join(f"{method} {base:.2g}" for method, base in bases.items()) + f"; power {power:.2f}")


def bests(study: RatesStudy, task: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Method -> arm -> its size and best rate. Arms whose number of steps is another than the others' are left out."""
    from rates_study import at_lattice
    from trimtab.config.read import build_config
    from trimtab.config.resolve import plan_of
    from trimtab.training.rate_prior import size_of

    found: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for name, arm in study.pairs:
        if name != task or study.said.arms[arm].train:
            continue
        losses = mean_losses([study.losses(task, arm, seed) for seed in study.said.seeds])
        if len(losses) < 3:
            continue
        settings = {**study.settings(task, arm), "data": {"train": "rows.jsonl"}, "output": "none"}
        plan = plan_of(build_config(settings, study.state, arm))
        assert plan is not None, "an arm has a plan"
        (rule,) = plan.rules
        found[rule.method][arm] = (size_of(rule.options), at_lattice(smooth_best(losses)))
    return dict(found)


def mean_losses(seeds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Lattice index -> mean loss over the seeds, of which some may lack some rates: a seed is taken to lie as far above
    or below the others everywhere (least squares, with a term for each rate and one for each seed). Infinite where a
    training diverged."""
    import numpy as np

    places = sorted({index for losses in seeds for index in losses})
    diverged = {index for losses in seeds for index, loss in losses.items() if not math.isfinite(loss)}
    finite = [index for index in places if index not in diverged]
    there = [losses for losses in seeds if any(index in losses for index in finite)]
    known = [
        (finite.index(index), number, losses[index])
        for number, losses in enumerate(there)
        for index in finite
        if index in losses
    ]
    terms = np.zeros((len(known), len(finite) + len(there)))
    for row, (place, number, _) in enumerate(known):
        terms[row, place] = terms[row, len(finite) + number] = 1
    found = np.linalg.lstsq(terms, np.array([loss for _, _, loss in known]), rcond=None)[0]
    level = float(found[len(finite) :].mean()) if there else 0.0
    means = {index: float(found[place]) + level for place, index in enumerate(finite)}
    return {index: means.get(index, math.inf) for index in places}


def smooth_best(losses: Mapping[int, float]) -> float:
    """The place on the lattice where a parabola through the lowest losses is lowest, within the rates that it is
    drawn through."""
    import numpy as np

    places = sorted(index for index in losses if math.isfinite(losses[index]))
    best = min(places, key=lambda index: losses[index])
    at = places.index(best)
    beside = places[max(0, at - 1) : at + 2]
    drawn = sorted({index for index in places if losses[index] <= losses[best] + NEAR} | set(beside))
    if len(drawn) < 3:
        return float(best)
    curve, slope, _ = np.polyfit(drawn, [losses[index] for index in drawn], 2)
    return float(np.clip(-slope / (2 * curve), drawn[0], drawn[-1])) if curve > 0 else float(best)


def lines(methods: Mapping[str, Sequence[tuple[float, float]]]) -> tuple[dict[str, float], float]:
    """A base for each method and the power they share, of the lines through their sizes and rates (least squares)."""
    logs = {method: [(math.log(size), math.log(rate)) for size, rate in arms] for method, arms in methods.items()}
    middles = {method: tuple(map(statistics.fmean, zip(*arms, strict=True))) for method, arms in logs.items()}
    beside = [
        (size - middles[method][0], rate - middles[method][1]) for method, arms in logs.items() for size, rate in arms
    ]
    spread = sum(size**2 for size, _ in beside)
    power = -sum(size * rate for size, rate in beside) / spread if spread else 0.0
    return {method: math.exp(rate + power * size) for method, (size, rate) in middles.items()}, power


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
