"""Whether a run fits into the memory of this machine, and which changes of its settings would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from trimtab import bases, tasks
from trimtab.config.resolve import Job
from trimtab.data.sources import is_local
from trimtab.errors import TrimtabError
from trimtab.machine import GIB, available_memory, check_fits, describe_device
from trimtab.memory.estimate import RunMemory, estimate_run
from trimtab.models.gguf import is_dequantised
from trimtab.processes import here
from trimtab.runs.events import Listener
from trimtab.runs.records import PlanRecord
from trimtab.surgery.attach_report import AttachReport
from trimtab.tasks import Inputs, RowSizes

Change = Mapping[str, Any]
"""Settings by their dotted keys."""

Check = Callable[[Job, Inputs | None, AttachReport], Iterable[str]]
"""Looks at a run before it begins: its rows, if they could be read, and what the plan does to its model."""

SHORTEST = 64
"""Tokens: ``data.max_length`` is not suggested to be lower."""


@dataclass(frozen=True)
class Suggestion:
    """A change of settings with which the run fits, and what it takes then."""

    change: Change
    memory: RunMemory

    @property
    def overrides(self) -> str:
        """The change as the command line takes it."""
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.change.items())

    def __str__(self) -> str:
        return f"{self.overrides}: {self.memory.hardest.needed / GIB:.2f} GiB"


def check_run(job: Job, sizes: RowSizes) -> AttachReport:
    """Raise ModelError, with what would help, if a run needs more memory than the machine has free. Gives what the plan
    will do to the model."""
    memory = estimate_run(job, sizes)
    estimate = memory.hardest
    if estimate.needed > _room(job):
        advice = [str(suggestion) for suggestion in suggest(job, sizes)] or ["a smaller model"]
        what, sharing = f"Training {job.config.model.name}", _sharing(job)
        if sharing > 1:
            what = f"{what} in {sharing} processes on this machine ({estimate.needed / GIB:.2f} GiB each)"
            advice = [*advice, "fewer processes"]
        check_fits(what, estimate.needed * sharing, job.device, parts=estimate.told, advice=advice)
    if memory.host is not None:
        needed = memory.host.needed * here().local
        check_fits(f"Loading {job.config.model.name}", needed, parts=memory.host.told)
    assert memory.attached is not None
    return memory.attached


def suggest(job: Job, sizes: RowSizes) -> list[Suggestion]:
    """Changes that make a run fit, each estimated by itself; first those that alter its results least.

    Of each kind of change, the mildest that fits is given. Only where no single change is enough are several tried
    together.
    """
    room = _room(job)
    attempts = _attempts(job, sizes)

    def fitting(change: Change) -> Suggestion | None:
        memory = _with(job, sizes, change)
        return Suggestion(change, memory) if memory.hardest.needed <= room else None

    for ladders in attempts:
        enough = []
        for *milder, strongest in filter(None, ladders):
            # Where the strongest change is not enough, the milder ones need not be looked at.
            if last := fitting(strongest):
                enough.append(next((fits for change in milder if (fits := fitting(change))), last))
        if enough:
            return enough
    return []


def read_rows(job: Job) -> tuple[Inputs | None, str]:
    """The rows of ``job``, where their files and the tokenizer are there to be read, and a word on where their length
    is from: the longest of them, or else ``data.max_length``."""
    data, source = job.config.data, job.source
    why = f"the cap data.max_length = {job.max_length}, since"
    measured = [*(data.validation if isinstance(data.validation, tuple) else ()), *chain(*data.test.values())]
    if missing := [source.path for source in (*data.train, *measured) if not is_local(source.path, Path.cwd())]:
        return None, f"{why} {missing[0]} is not here"
    if source.kind == "gguf" and not is_dequantised(Path(source.location)):
        return None, f"{why} the tokenizer is still in {Path(source.location).name}"
    try:
        inputs = (task := tasks.of(job)).read(job, task.reader(source), Listener())
    except TrimtabError as error:
        return None, f"{why} the rows cannot be read ({error})"
    return inputs, "the longest row"


def describe_run(job: Job, length: int | None = None, check: Check | None = None) -> dict[str, Any]:
    """What ``trimtab plan`` says, as plain values: what the plan does to the model, ``memory``, all sizes in GiB,
    ``rows``, what is taken of each source (None where they cannot be read), and ``notes``.

    Args:
        length: tokens of a row, all of which carry loss, in place of what the data has.
        check: what a run does before it begins (`training.checks`): it gives what the user should know, and raises.
    """
    job, inputs, sizes, origin = _measured(job)
    if length is not None and not sizes.shape:
        sizes, origin = replace(sizes, length=length, labels=length - 1), "--length"
    memory, room = estimate_run(job, sizes), _room(job)
    fits = memory.hardest.needed <= room
    host = memory.host
    if host is not None:
        fits = fits and host.needed * here().local <= available_memory()
    assert memory.attached is not None
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
        "free": room / GIB,
        "fits": fits,
        "uncounted": memory.uncounted,
        "suggestions": [
            {"change": suggestion.overrides, "needed": suggestion.memory.hardest.needed / GIB}
            for suggestion in ([] if fits else suggest(job, sizes))
        ],
    }
    attached = memory.attached
    told = {"lowered_ranks": attached.lowered_ranks, "unreached": attached.unreached}
    notes = [*(inputs.notes if inputs is not None else ()), *(check(job, inputs, attached) if check else ())]
    return {**PlanRecord.of(attached).plain(), **told, "memory": described, "rows": _rows(inputs), "notes": notes}


def planned_memory(job: Job) -> RunMemory:
    """What ``trimtab plan`` says of the memory of ``job``, in bytes. Raises as the run itself would."""
    job, _, sizes, _ = _measured(job)
    return estimate_run(job, sizes)


def _measured(job: Job) -> tuple[Job, Inputs | None, RowSizes, str]:
    """``job`` with the head that its rows ask for, the rows where they can be read, their sizes and where those are
    from."""
    inputs, origin = read_rows(job)
    task = tasks.of(job)
    if inputs is not None:
        job = job.read_for(task.head_for(job, inputs))
    return job, inputs, task.sizes(job, inputs) if inputs is not None else task.largest(job), origin


def _sharing(job: Job) -> int:
    """How many processes take of one memory: all on this machine, where they have no accelerator each."""
    return here().local if job.device.type == "cpu" else 1


def _room(job: Job) -> int:
    """Bytes that are free for each process."""
    return available_memory(job.device) // _sharing(job)


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


def _attempts(job: Job, sizes: RowSizes) -> Iterator[list[list[Change]]]:
    """Ladders of changes, each from mild to strong: first of single changes, then of more and more at once."""
    config, train = job.config, job.config.train
    recompute: Change = {} if train.gradient_checkpointing else {"train.gradient_checkpointing": True}
    halve: Change = {} if job.precision != "float32" else {"train.precision": "bfloat16"}
    smaller = list(_smaller_batches(train.batch_size, train.gradient_accumulation))
    kinds = [] if config.quantisation != "none" or job.trains_base else bases.quantised_by_size()
    packed: list[Change] = [{"quantisation": kind} for kind in kinds]
    together = [change for change in (recompute, halve) if change]
    yield [*([change] for change in together), smaller, packed]
    both: Change = {**recompute, **halve}
    if both:
        yield [[both], [{**both, **batch} for batch in smaller], [{**both, **kind} for kind in packed]]
    least: Change = {**both, **(packed[-1] if packed else {})}
    if packed:
        yield [[{**least, **batch} for batch in smaller]]
    least = {**least, **(smaller[-1] if smaller else {})}
    yield [[{**least, "data.max_length": length} for length in _shorter(sizes.length)]]


def _smaller_batches(rows: int, accumulation: int) -> Iterator[Change]:
    """Half the rows, then half of those, and so on, with as many more passes to a step."""
    size = rows
    while size > 1:
        size //= 2
        yield {"train.batch_size": size, "train.gradient_accumulation": -(-rows * accumulation // size)}


def _shorter(length: int) -> Iterator[int]:
    while (length := length // 2) >= SHORTEST:
        yield length


def _with(job: Job, sizes: RowSizes, change: Change) -> RunMemory:
    """The estimate after ``change``."""
    config = job.config
    train = {key.removeprefix("train."): value for key, value in change.items() if key.startswith("train.")}
    changed: dict[str, Any] = {"train": config.train.model_copy(update=train)}
    if (quantisation := change.get("quantisation")) is not None:
        changed["quantisation"] = quantisation
    config = config.model_copy(update=changed)
    if (length := change.get("data.max_length")) is not None:
        sizes = replace(sizes, length=length, labels=min(sizes.labels, length - 1))
    return estimate_run(replace(Job.of(config), task=job.task, source=job.source), sizes)
