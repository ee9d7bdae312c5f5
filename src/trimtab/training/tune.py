"""Finds the learning rate of a run without the run: what ``trimtab tune`` does."""

from __future__ import annotations

from typing import Any

from trimtab import tasks
from trimtab.config.run import RunConfig
from trimtab.memory.estimate import check_run
from trimtab.models.load import load_model
from trimtab.models.model_files import quiet_libraries
from trimtab.runs.events import Listener
from trimtab.runs.rate_record import ChosenRate
from trimtab.training.checks import checked_inputs
from trimtab.training.on_device import fitted
from trimtab.training.rate_trials import find_rate
from trimtab.training.several import require_fit


def tune(config: RunConfig, listener: Listener) -> ChosenRate:
    """Make the trials of a run and give the rate that they speak for. Nothing is written. Raises as `finetune` does."""
    from trimtab.reports.run.rate_table import rate_table

    job = tasks.job_of(config)
    require_fit(config)
    listener.stage("Reading the rows")
    job, inputs = tasks.inputs_of(job, listener)
    task = tasks.of(job)
    inputs = checked_inputs(job, inputs, check_run(job, task.sizes(job, inputs)), listener)
    quiet_libraries()
    listener.stage(f"Loading {config.model.name}")
    model: Any = load_model(job.files, job.dtype, config.model.attention, config.quantisation, job.device)
    job = fitted(job, task, model, job.reader, listener.remark)
    listener.stage("Finding the learning rate")
    found = find_rate(job, inputs, model, listener=listener)
    listener.show(rate_table(found))
    return found
