"""Finds the learning rate of a run without the run: what ``trimtab tune`` does."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trimtab import tasks
from trimtab.adapters.placing import adapter_digest
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.errors import STOPS, Interrupted
from trimtab.machine import versions
from trimtab.models.gguf import cache_folder
from trimtab.models.known_again import model_digest
from trimtab.runs.beginning import deciding
from trimtab.runs.events import Listener
from trimtab.runs.rate_record import ChosenRate
from trimtab.tasks import Inputs
from trimtab.training.checks import checked_inputs
from trimtab.training.rate_trials import find_rate
from trimtab.training.several import require_fit
from trimtab.training.work import Work


def tune(config: RunConfig, listener: Listener) -> ChosenRate:
    """Make the trials of a run and give the rate that they speak for. Until it is found, trials that are done are kept
    in the cache, and the same call goes on from them. Raises as `finetune` does."""
    job = tasks.job_of(config)
    require_fit(config)
    listener.stage("Reading the rows")
    job, inputs = tasks.inputs_of(job, listener)
    inputs = checked_inputs(job, inputs, listener)
    listener.stage(f"Loading {config.model.name}")
    work = Work(job, inputs, listener)
    listener.stage("Finding the learning rate")
    file = cache_folder().with_name("trials") / f"{_digest(work.job, inputs)}.json"
    kept = _can_hold(file.parent)
    if not kept:
        listener.note(f"trials are not kept: {file.parent} cannot be written")
    try:
        found = find_rate(work.job, inputs, work.model, listener=listener, file=file if kept else None)
    except STOPS as stop:
        if not file.is_file():
            raise
        raise Interrupted.by(
            stop, "interrupted; the trials that are done are kept. Go on with the same command"
        ) from None
    file.unlink(missing_ok=True)
    return found


def _digest(job: Job, inputs: Inputs) -> str:
    """By which the trials of the same run are known again: all that they depend on."""
    config = job.config
    said: list[Any] = [
        *(deciding(config), config.train.epochs, config.train.max_steps, str(job.device), job.precision, versions()),
        *(inputs.digests.plain(), config.model.name, model_digest(job.source)),
        adapter_digest(config.adapter) if config.adapter is not None else None,
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _can_hold(folder: Path) -> bool:
    """Whether files can be written in ``folder``, which is made if there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
