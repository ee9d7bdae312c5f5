"""Finds the learning rate of a run without the run: what ``trimtab tune`` does, and ``trimtab plan`` says of it."""

from __future__ import annotations

from typing import Any

from trimtab import tasks
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.errors import TrimtabError
from trimtab.machine import device
from trimtab.memory.suggest import check_run
from trimtab.models.load import load_model, quiet_libraries
from trimtab.runs.events import Listener
from trimtab.runs.rate_record import ChosenRate
from trimtab.training.checks import checked_inputs
from trimtab.training.rate_trials import find_rate, plan_trials
from trimtab.training.schedule import total_steps


def tune(config: RunConfig, listener: Listener) -> ChosenRate:
    """Make the trials of a run and give the rate that they speak for. Nothing is written. Raises as `finetune` does."""
    from trimtab.reports.run.rate_table import rate_table

    job = tasks.job_of(config)
    task = tasks.of(job)
    reader = task.reader(job.source)
    listener.stage("Reading the rows")
    inputs = task.read(job, reader, listener)
    job = job.read_for(task.head_for(job, inputs))
    inputs = checked_inputs(job, inputs, check_run(job, task.sizes(job, inputs)), listener)
    quiet_libraries()
    listener.stage(f"Loading {config.model.name}")
    model: Any = load_model(job.source, job.dtype, config.model.attention, config.quantisation)
    listener.stage("Finding the learning rate")
    found = find_rate(job, inputs, model.to(device()), task=task, reader=reader, listener=listener)
    listener.show(rate_table(found))
    return found


def told_trials(job: Job) -> str | None:
    """What ``train.learning_rate: auto`` will do, for ``trimtab plan``; None for a run whose rate is a number."""
    train = job.config.train
    if train.learning_rate != "auto" or not train.epochs:
        return None
    try:
        inputs = (task := tasks.of(job)).read(job, task.reader(job.source), Listener())
    except TrimtabError:
        return f"learning rate: found by trials, which cost at most {train.tune.budget:.0%} of the run's steps"
    steps = total_steps(train, len(inputs.rows))
    plan = plan_trials(train, steps, len(inputs.validation))
    if not plan.rounds:
        return f"learning rate: the likely one, since {steps:,} steps are too few for trials"
    return f"learning rate: found by trials, {plan.told} ({plan.cost / steps:.0%} of {steps:,})"
