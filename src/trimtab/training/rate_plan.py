"""Which trials ``train.learning_rate: auto`` makes, and what ``trimtab plan`` says of them.

Nothing is trained here, and so nothing that trains is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab import tasks
from trimtab.config.resolve import Job
from trimtab.config.run import TrainConfig
from trimtab.errors import TrimtabError
from trimtab.runs.events import Listener

SHORTEST = 16
"""Steps: what a shorter training ends with says nothing of the rate. In `studies/commonsense` (LoRA of rank 32, 138
steps, one seed) trials of 5 steps chose a rate with which the run ended 0.12 nats a token above the best of five rates,
and those of 20 steps one among the best."""

_FORWARD = 1 / 3
"""What measuring a row costs beside training on it: one pass of three."""


@dataclass(frozen=True)
class TrialPlan:
    """``rounds``: how many rates, and for how many steps each; ``rows``: to measure each trial on; ``cost``: of all of
    it, in steps of the run."""

    rounds: tuple[tuple[int, int], ...]
    rows: int
    cost: float

    @property
    def told(self) -> str:
        """The trials in words, where there are any."""
        rounds = ", then ".join(f"{rates} of {steps} steps" for rates, steps in self.rounds)
        return f"{rounds}, as much as {self.cost:.0f} steps of the run"


def plan_trials(train: TrainConfig, train_rows: int, validation_rows: int) -> TrialPlan:
    """Which trials a run over ``train_rows`` rows affords."""
    budget = train.tune.budget * train.total_steps(train_rows)
    batch = train_rows / train.epoch_steps(train_rows)  # on average: the last of an epoch may be a small one
    for rates in ((5, 3), (3,)):
        lengths = [2**turn for turn in range(len(rates))]
        trials, units = sum(rates), sum(count * length for count, length in zip(rates, lengths, strict=True))
        # At most a quarter of the budget is for measuring.
        rows = min(validation_rows, train.tune.rows, int(budget / 4 / trials * batch / _FORWARD))
        measuring = trials * rows / batch * _FORWARD
        unit = int((budget - measuring) / units)
        if unit >= SHORTEST:
            rounds = tuple((count, unit * length) for count, length in zip(rates, lengths, strict=True))
            return TrialPlan(rounds, rows, unit * units + measuring)
    return TrialPlan((), 0, 0.0)


def told_trials(job: Job) -> str | None:
    """What ``train.learning_rate: auto`` will do, for ``trimtab plan``; None for a run whose rate is a number."""
    train = job.config.train
    if train.learning_rate != "auto" or not train.epochs:
        return None
    try:
        inputs = tasks.of(job).read(job, job.reader, Listener())
    except TrimtabError:
        return f"learning rate: found by trials, which cost at most {train.tune.budget:.0%} of the run's steps"
    steps = train.total_steps(len(inputs.rows))
    plan = plan_trials(train, len(inputs.rows), len(inputs.validation))
    if not plan.rounds:
        return f"learning rate: the likely one, since {steps:,} steps are too few for trials"
    return f"learning rate: found by trials, {plan.told} ({plan.cost / steps:.0%} of {steps:,})"
