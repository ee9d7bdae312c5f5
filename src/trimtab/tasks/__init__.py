"""The tasks: what a model is asked for. One file is one task, and the file's name is the task's name.

A task says which class of model it takes, how its rows are read and batched, what its loss is, how it is measured, and
what head is trained beside the adapter (`_task.py`). Putting such a file into this folder is all it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from trimtab import listing
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.data.labelled import is_broken
from trimtab.data.sources import is_local, rows_of
from trimtab.errors import ConfigError, TrimtabError, did_you_mean
from trimtab.models.causal_head import Head
from trimtab.models.locate import ModelHead
from trimtab.runs.events import Listener
from trimtab.tasks._answer import Answer
from trimtab.tasks._inputs import Inputs
from trimtab.tasks._sizes import Batch, RowSizes
from trimtab.tasks._task import Measurement, Task
from trimtab.tasks._texts import read_inputs

__all__ = [
    "Answer",
    "Batch",
    "Head",
    "Inputs",
    "Measurement",
    "RowSizes",
    "Task",
    "find",
    "inputs_of",
    "job_of",
    "names",
    "of",
    "of_head",
    "read_inputs",
]


LOOKED_AT = 200
"""Rows that may tell what their task is."""


def names() -> list[str]:
    """The names of all tasks, sorted."""
    return listing.names(__path__)


@cache
def find(name: str) -> Task:
    """The task of that name. Raises ConfigError, which names the nearest, if there is none."""
    if name not in names():
        raise ConfigError(f"no task '{name}': expected one of {', '.join(names())}.{did_you_mean(name, names())}")
    return listing.class_in(__name__, name, Task)()  # type: ignore[type-abstract]


def of(job: Job) -> Task:
    """The task of a job that ``job_of`` made."""
    return find(job.task)


def of_head(head: ModelHead) -> Task:
    """The task of a model that was read for ``head``. Raises ConfigError if it is none of ours."""
    tasks = sorted(map(find, names()), key=lambda task: task.precedence)
    task = next((task for task in tasks if task.serves(head)), None)
    if task is None:
        raise ConfigError(f"no task here has a model of the class {head.model_class}")
    return task


def job_of(config: RunConfig) -> Job:
    """What ``config`` names, with its task: where it says none, the one that its model and the first row speak for.

    Raises as ``Job.of`` does.
    """
    job = Job.of(config)
    name = _meant(job) if config.task == "auto" else config.task
    task = find(name)
    writes = task.model_class == ModelHead().model_class
    if writes and job.source.kind != "gguf" and job.files.family == "encoder":
        raise ConfigError(
            f"task: {name}: {job.source.name} reads a text in both directions, so it would see the very tokens that it "
            "is to write. Take a model that writes, or a task for this one: leave out task"
        )
    if writes and job.source.kind != "gguf" and job.files.reads_no_text:
        raise ConfigError(
            f"{job.source.name}: a {job.files.config.model_type} writes what it hears or sees, and a run trains on "
            "texts, or on pictures that are sorted. Adapt it in Python (trimtab.attach), with transformers' Trainer"
        )
    job = job if task.precision is None else job.computing_in(task.precision)
    return replace(job, task=name).read_for(ModelHead(task.model_class))


def inputs_of(job: Job, listener: Listener) -> tuple[Job, Inputs]:
    """The rows of ``job``, and ``job`` with the head that they ask for. Raises as ``Task.read`` does."""
    task = of(job)
    inputs = task.read(job, job.reader, listener)
    return job.read_for(task.head_for(job, inputs)), inputs


def _meant(job: Job) -> str:
    if job.source.kind == "gguf":
        return "causal_lm"
    kind, classes = job.files.family, list(job.files.config.architectures or [])
    row = None if kind == "decoder" and classes and classes[0].endswith(("ForCausalLM", "LMHeadModel")) else _first(job)
    tasks = sorted(map(find, names()), key=lambda task: task.precedence)
    return next(task.name for task in tasks if task.suits(kind, classes, row))


def _first(job: Job) -> Mapping[str, Any] | None:
    """The first training row under our keys, where it can be read. Where its label is a whole number, the next rows say
    whether all are: one that is not speaks for them."""
    source = job.config.data.settled(job.config.data.train)[0]
    if not is_local(source.path, Path.cwd()):
        return None
    rows: list[Mapping[str, Any]] = []
    with suppress(TrimtabError):  # whoever reads the rows says what is wrong with them
        rows.extend(row.value for row in islice(rows_of(source, root=Path.cwd()), LOOKED_AT))
    return next((row for row in rows if is_broken(row.get("label"))), rows[0] if rows else None)
