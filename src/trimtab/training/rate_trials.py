"""``train.learning_rate: auto``: a few short trainings from the run's own start find the rate that it trains with.

Every trial is the run in small: the same adapter at its start, the same rows in the same order, the same schedule over
fewer steps; the rate alone is another. The first round tries five rates around the likely one (`rate_prior`), the
second the best of them and its two neighbours for twice as many steps. All of it, with the measuring, costs at most
``train.tune.budget`` of the run's steps. A run that is too short for that takes fewer trials, or the likely rate.

Of the last round, the rate is taken at which the loss, drawn as a smooth curve through the trials, is lowest. Where
trials are as good as equal the likely rate decides: the loss counts in units of `flat`, the distance from the likely
rate in those of `rate_prior.SPREAD`.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import set_seed

from trimtab import tasks
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig, TrainConfig
from trimtab.errors import DataError, ModelError
from trimtab.evaluation.shortened import shortened
from trimtab.models.load import whole_modules
from trimtab.processes import here
from trimtab.reports.run.rate_table import rate_table
from trimtab.runs.events import Listener
from trimtab.runs.rate_record import ChosenRate, RateTrial, read_rate
from trimtab.runs.records import MetricsLine
from trimtab.surgery.attach import detach
from trimtab.surgery.plan import Rule
from trimtab.tasks import Inputs
from trimtab.training.callbacks import Trying
from trimtab.training.rate_plan import TrialPlan, plan_trials
from trimtab.training.rate_prior import SPREAD, labels_of_step, likely_rate
from trimtab.training.trainer import AdapterTrainer, Diverged

APART = 1 / 3
"""Decades between neighbouring rates: a factor of 2.15."""

FLAT, FLAT_STEPS = 0.02, 32
"""Nats a token: a difference that the rows of a trial of so many steps or more do not tell from none."""


def flat(steps: int) -> float:
    """A difference in loss that a trial of so many steps does not tell from none: more for a shorter one, whose loss
    chance decides (in ``studies/rates`` seeds differ by 0.05 nats after 8 steps, by 0.03 after 32 and by 0.01 after 96)
    and where a low rate looks better than it is in the end (Wu et al., "Understanding Short-Horizon Bias in Stochastic
    Meta-Optimization", ICLR 2018)."""
    return FLAT * max(1.0, FLAT_STEPS / steps)


def with_rate(job: Job, inputs: Inputs, model: nn.Module, *, listener: Listener, file: Path | None = None) -> RunConfig:
    """The run's configuration with a number as its rate: its own, or the one that ``find_rate`` finds."""
    if job.config.train.learning_rate != "auto":
        return job.config
    listener.stage("Finding the learning rate")
    found = find_rate(job, inputs, model, listener=listener, file=file)
    assert found.rate is not None, "a search that ended has a rate"
    return at_rate(job.config, found.rate)


def at_rate(config: RunConfig, rate: float) -> RunConfig:
    """``config`` with ``rate`` as its learning rate."""
    return config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": rate})})


def find_rate(
    job: Job, inputs: Inputs, model: nn.Module, *, listener: Listener, file: Path | None = None
) -> ChosenRate:
    """Find the rate for a run and show how; ``model`` carries no adapter before and after, and is as it was. Where
    several processes train, all make the same trials together.

    ``file`` keeps each trial once it is done: what stands there already is not done again. The leading process alone
    reads and writes it.
    """
    group = here()
    train = job.config.train
    steps = train.total_steps(len(inputs.rows))
    plan = plan_trials(train, len(inputs.rows), len(inputs.validation))
    search = _Search(job, inputs, model, listener=listener, rows=plan.rows)
    likely = search.likely(steps)
    file = file if group.leads else None
    known = group.gathered(read_rate(file) if file is not None else None)[0]
    if known is not None and known.rate is not None:
        listener.note(f"learning rate {known.rate:g}, as it was found")
        return known
    if plan.rounds:
        listener.note(f"trials: {plan.told}")
    found = ChosenRate(rate=None, likely=likely, run_steps=steps, rows=search.rows, cost=round(plan.cost, 1), trials=[])
    earlier = {(one.round, one.rate, one.steps): one for one in known.trials} if known is not None else {}

    def tried(rates: list[float], turn: int, length: int) -> list[RateTrial]:
        nonlocal found
        trials = []
        for rate in rates:
            trial = earlier.get((turn, rate, length)) or search.trial(rate, turn, length)
            trials.append(trial)
            found = found.updated(trials=[*found.trials, trial])
            if file is not None:
                found.write_to(file)
        return trials

    likely_ones = [search.likely(length) for _, length in plan.rounds]
    rate, why = _narrow(plan, likely_ones, tried, tasks.of(job).nats)
    if rate is None:
        rate = likely
    else:  # from the length of the last trials to that of the run
        length = plan.rounds[-1][1]
        rate *= likely / likely_ones[-1]
        why += f"; a run of {steps:,} steps wants less than one of {length:,}" if length < steps else ""
    found = found.updated(rate=float(f"{rate:.3g}"), why=why)
    if file is not None:
        found.write_to(file)
    if found.trials:
        listener.show(rate_table(found))
    tell = listener.remark if found.trials and not found.decided else listener.note
    tell(f"learning rate {found.rate:g}: {why}")
    return found


def _narrow(
    plan: TrialPlan,
    likely: list[float],
    tried: Callable[[list[float], int, int], list[RateTrial]],
    nats: Callable[[float], float] = float,
) -> tuple[float | None, str]:
    """The rate that the rounds of ``plan`` end with, for trainings as long as the last ones, and how it was chosen.
    ``likely``: the likely rate of each round; ``tried(rates, round, steps)`` makes trials; ``nats``: of a loss. None:
    no trial was made."""
    centre, trials = 0, []
    for turn, ((count, steps), around) in enumerate(zip(plan.rounds, likely, strict=True), 1):
        places = range(centre - count // 2, centre + count // 2 + 1)
        trials = tried([_rounded(around, place) for place in places], turn, steps)
        best = min(range(len(trials)), key=lambda at: (_cost(trials[at]), trials[at].rate))
        # Where all have diverged, the next round goes as far below them as it can without a gap.
        centre = places[best] if math.isfinite(_cost(trials[best])) else places[0] - 2
    if not trials:
        return None, "the likely one; the run is too short for trials within their budget"
    if not any(math.isfinite(_cost(trial)) for trial in trials):
        lowest = trials[0]
        return lowest.rate / 10, f"far below {lowest.rate:g}, since every trial of {lowest.steps:,} steps diverged"
    rate = choose(trials, likely[-1], nats)
    return rate, _why(rate, trials)


def _why(rate: float, trials: list[RateTrial]) -> str:
    """How ``choose`` came to ``rate``."""
    best = min(trials, key=_cost)
    if abs(math.log10(rate / best.rate)) > APART / 2:
        return f"the losses of the last trials differ too little to go further from the likely rate than {rate:g}"
    edge = {trials[0].rate: "lowest", trials[-1].rate: "highest"}.get(rate)
    if edge:
        return f"the {edge} rate of the last trials, {rate:g}, was the best of them"
    return f"the losses of the last trials are lowest at {rate:g}"


def choose(trials: list[RateTrial], likely: float, nats: Callable[[float], float] = float) -> float:
    """The rate that the trials of one length speak for; ``likely``: that for trainings of this length."""
    finite = [(math.log10(trial.rate), nats(trial.loss)) for trial in trials if trial.loss is not None]
    if len(finite) == 1:
        return _rounded(10 ** finite[0][0], 0)
    places, losses = map(np.array, zip(*sorted(finite), strict=True))
    between = np.unique(np.append(np.linspace(places[0], places[-1], 81), places))
    cost = PchipInterpolator(places, losses)(between) / flat(trials[0].steps)
    cost += ((between - math.log10(likely)) / SPREAD) ** 2 / 2
    return _rounded(float(10 ** between[cost.argmin()]), 0)


def _cost(trial: RateTrial) -> float:
    return math.inf if trial.loss is None else trial.loss


def _rounded(rate: float, place: int) -> float:
    return float(f"{rate * 10 ** (place * APART):.3g}")


def _noted(loss: float) -> float:
    """``loss`` as it is written down: that of a regression may be of any size."""
    return float(f"{loss:.7g}")


def _rules_of_rate(job: Job, model: nn.Module) -> list[Rule]:
    """The rules that the likely rate is that of: not those of what begins anew, a head of the task and added rows, nor
    of norms and biases, which are trained at any rate. By themselves they would be taken as full fine-tuning of a
    pretrained matrix."""
    whole = set(whole_modules(job.files, model))
    report = job.attach_to(model)
    detach(model)
    pretrained = {module.rule for module in report.modules if module.name not in whole and module.in_features > 1}
    return [
        rule
        for number, rule in enumerate(report.rules, 1)
        if number in pretrained and getattr(rule.options, "rows", None) is None
    ]


class _Search:
    """Makes trials of one run."""

    def __init__(self, job: Job, inputs: Inputs, model: nn.Module, *, listener: Listener, rows: int) -> None:
        self._job, self._inputs, self._model = job, inputs, model
        self._task, self._reader, self._listener = tasks.of(job), job.reader, listener
        self._head = self._task.head(model)
        self._rules = _rules_of_rate(job, model)
        self._labels = labels_of_step(inputs.rows, job.config.train)
        self._measured = self._some_of(inputs.validation, rows)
        # Training counts these along, in frozen batch norms too.
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._counted = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    def _some_of(self, validation: Sequence[Any], rows: int) -> list[Any]:
        """So many rows, evenly over all, which may be sorted; none where no answer of theirs can be read whole."""
        some = [validation[at * len(validation) // rows] for at in range(rows)]
        if self._task.checked_as_texts:
            try:
                shortened(some, self._reader, self._job.max_length)
            except DataError:
                return []
        return some

    @property
    def rows(self) -> int:
        """How many validation rows each trial is measured on."""
        return len(self._measured)

    def likely(self, steps: int) -> float:
        """The likely rate of a training of so many steps."""
        text = getattr(self._model.config, "get_text_config", lambda: None)()
        width = getattr(text, "hidden_size", None)
        ratio = self._job.config.train.b_learning_rate_ratio
        return likely_rate(self._rules, width, steps=steps, labels=self._labels, b_ratio=ratio)

    def trial(self, rate: float, turn: int, steps: int) -> RateTrial:
        """Train for ``steps`` steps at ``rate``."""
        began = time.perf_counter()
        train = self._job.config.train
        changed: dict[str, Any] = {"learning_rate": rate, "max_steps": steps, "log_every": 1, "average": None}
        if isinstance(train.warmup, int):  # the same share of fewer steps
            changed["warmup"] = min(0.9, train.warmup / train.total_steps(len(self._inputs.rows)))
        set_seed(train.seed)
        self._job.attach_to(self._model)
        try:
            loss = self._trained(train.model_copy(update=changed))
        except (Diverged, ModelError):  # a loss that is not a number, in training or in measuring
            loss = None
        finally:
            detach(self._model)
            for buffer, value in self._counted:
                buffer.copy_(value)
            gc.collect()
        seconds = round(time.perf_counter() - began, 2)
        trial = RateTrial(round=turn, rate=rate, steps=steps, loss=loss, seconds=seconds)
        told = trial.told if loss is None else f"loss {trial.told}"
        self._listener.note(f"trial at {rate:g}, {steps} steps: {told}")
        return trial

    def _trained(self, train: TrainConfig) -> float:
        """Train the adapter that the model carries; gives the loss at the end."""
        lines: list[MetricsLine] = []
        with tempfile.TemporaryDirectory() as folder:
            trainer = AdapterTrainer(
                self._model,
                train,
                self._inputs.rows,
                task=self._task,
                head=self._head,
                reader=self._reader,
                folder=Path(folder),
                record=lines.append,
                callbacks=[Trying(self._listener, train.rate)],
            )
            trainer.args.save_strategy = "no"
            trainer.train()
        if not self._measured:  # the later half, in which the rate has fallen
            losses = [line.loss for line in lines if line.loss is not None]
            return _noted(float(np.mean(losses[len(losses) // 2 :])))
        loss = self._task.validation_loss(self._head, self._reader, self._measured, inputs=self._inputs, job=self._job)
        return _noted(loss)
