"""Finds the learning rate of a run without the run: what ``trimtab tune`` does."""

from __future__ import annotations

from trimtab import tasks
from trimtab.config.run import RunConfig
from trimtab.runs.events import Listener
from trimtab.runs.rate_record import ChosenRate
from trimtab.training.checks import checked_inputs
from trimtab.training.rate_trials import find_rate
from trimtab.training.several import require_fit
from trimtab.training.work import Work


def tune(config: RunConfig, listener: Listener) -> ChosenRate:
    """Make the trials of a run and give the rate that they speak for. Nothing is written. Raises as `finetune` does."""
    job = tasks.job_of(config)
    require_fit(config)
    listener.stage("Reading the rows")
    job, inputs = tasks.inputs_of(job, listener)
    inputs = checked_inputs(job, inputs, listener)
    listener.stage(f"Loading {config.model.name}")
    work = Work(job, inputs, listener)
    listener.stage("Finding the learning rate")
    return find_rate(work.job, inputs, work.model, listener=listener)
