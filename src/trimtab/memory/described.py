"""What ``trimtab plan`` says of a run: what its plan does to the model, its memory, its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab import tasks
from trimtab.config.resolve import Job
from trimtab.data.sources import is_local, local_files
from trimtab.errors import ModelError, TrimtabError
from trimtab.machine import GIB, available_memory, describe_device
from trimtab.memory.estimate import RunMemory, estimate_run, room, suggest
from trimtab.models.gguf import is_dequantised
from trimtab.processes import here
from trimtab.runs.events import Listener
from trimtab.surgery.attach_report import AttachReport
from trimtab.tasks import Inputs, RowSizes

Check = Callable[[Job, Inputs | None, AttachReport], Iterable[str]]
"""Looks at a run before it begins: its rows, if they could be read, and what the plan does to its model."""


def describe_run(job: Job, length: int | None = None, check: Check | None = None) -> dict[str, Any]:
    """What ``trimtab plan`` says, as plain values: what the plan does to the model, ``memory``, all sizes in GiB,
    ``rows``, what is taken of each source (None where they cannot be read), and ``notes``.

    Args:
        length: tokens of a row, all of which carry loss, in place of what the data has.
        check: what a run does before it begins (`training.checks`): it gives what the user should know, and raises.
    """
    job, inputs, sizes, origin = _measured(job)
    if length is not None and not sizes.shape:
        sizes, origin = replace(sizes, length=length, labels=length - 1, tested=0, tested_labels=0), "--length"
    memory, free = estimate_run(job, sizes), room(job)
    fits = memory.hardest.needed <= free
    host = memory.host
    if host is not None:
        fits = fits and host.needed * here().local <= available_memory()
    described = {
        **describe_device(job.device),
        **({} if host is None else {"host": {"needed": host.needed / GIB, "free": available_memory() / GIB}}),
        "batch_size": max(1, job.config.train.batch_size // here().size),
        "processes": here().size,
        "length": sizes.length,
        "shape": list(sizes.shape),
        "length_from": origin,
        "moments": {
            estimate.moment: {name: size / GIB for name, size in estimate.parts().items()}
            for estimate in memory.moments
        },
        "peak": memory.peak.total / GIB,
        "needed": memory.hardest.needed / GIB,
        "free": free / GIB,
        "fits": fits,
        "uncounted": memory.uncounted,
        "suggestions": [
            {"change": suggestion.overrides, "needed": suggestion.memory.hardest.needed / GIB}
            for suggestion in ([] if fits else suggest(job, sizes, free))
        ],
    }
    attached = memory.attached
    notes = [*(inputs.notes if inputs is not None else ()), *(check(job, inputs, attached) if check else ())]
    return {**attached.to_dict(), "memory": described, "rows": _rows(inputs), "notes": notes}


def planned_memory(job: Job) -> RunMemory:
    """What ``trimtab plan`` says of the memory of ``job``, in bytes. Raises as the run itself would."""
    job, _, sizes, _ = _measured(job)
    return estimate_run(job, sizes)


def _measured(job: Job) -> tuple[Job, Inputs | None, RowSizes, str]:
    """What `_read` gives, with the sizes of the rows."""
    job, inputs, origin = _read(job)
    task = tasks.of(job)
    return job, inputs, task.sizes(job, inputs) if inputs is not None else task.largest(job), origin


def _read(job: Job) -> tuple[Job, Inputs | None, str]:
    """``job`` with the head that its rows ask for, the rows, where their files and the tokenizer are there to be read,
    and a word on where their length is from: the longest of them, or else ``data.max_length``. Raises as the run would
    for rows that are there and cannot be read."""
    data, source = job.config.data, job.source
    why = f"the cap data.max_length = {job.max_length}, since"
    if missing := [source.path for source in data.sources if not is_local(source.path, Path.cwd())]:
        return job, None, f"{why} {missing[0]} is not here"
    if source.kind == "gguf" and not is_dequantised(Path(source.location)):
        return job, None, f"{why} the tokenizer is still in {Path(source.location).name}"
    try:
        job, inputs = tasks.inputs_of(job, Listener())
    except TrimtabError as error:
        if all(local_files(source.path, Path.cwd()) for source in data.sources) and not isinstance(error, ModelError):
            raise
        return job, None, f"{why} the rows cannot be read ({error})"
    return job, inputs, "the longest row"


def _rows(inputs: Inputs | None) -> dict[str, Any] | None:
    """What ``trimtab plan`` says of the rows."""
    if inputs is None:
        return None
    return {
        "sources": [source.plain() for source in inputs.sources],
        "an_epoch": len(inputs.rows),
        "validation": len(inputs.validation),
        "tests": {name: len(tested) for name, tested in inputs.tests.items()},
    }
