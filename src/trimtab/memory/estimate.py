"""The memory of a run, estimated before anything of it is loaded: whether it fits into this machine, and which changes
of its settings would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import psutil
import torch

from trimtab import bases, tasks
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.data.batches import TOKENS
from trimtab.machine import GIB, available_memory, check_fits
from trimtab.memory.trace import Trace
from trimtab.models.load import empty_model
from trimtab.models.quantise import quantising_bytes, stored_sizes
from trimtab.processes import here
from trimtab.surgery.attach_report import AttachReport
from trimtab.tasks import Batch, RowSizes

BEYOND = 220 * 2**20
"""Bytes that a run's process holds at its peak beyond its tensors and what the process of ``trimtab plan`` holds:
training's libraries, threads, compiled products. ``python benchmarks/memory.py --process`` measures it."""

HOLES, PER_LOGITS, SHARE = 100 * 2**20, 6.0, 0.22
"""What glibc holds free between tensors while a model runs: this share of what a step makes and frees (activations and
gradients); and where logits come and go in blocks that it keeps, so many bytes (of a small model, no more than its
weights take), and so many times such a block. Fitted to the runs of ``benchmarks/memory.py``. An allocator that gives
freed memory back at once holds nothing, but made a step take nearly half as long again."""

RETURNED = 32 * 2**20
"""A freed block of this size goes back to the system at once, whatever glibc does with smaller ones."""

NO_ROOM = ("files", "process")
"""Parts of an estimate for which no room has to be free: the system takes them back, or they are held already."""


Change = Mapping[str, Any]
"""Settings by their dotted keys."""

SHORTEST = 64
"""Tokens: ``data.max_length`` is not suggested to be lower."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for, at the moment at which their sum is largest."""

    weights: int
    adapters: int = 0
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    """What is kept for the backward pass, and the temporary tensors of that moment."""
    fragmentation: int = 0
    """What the allocator holds free between tensors, in holes that are too small for the next one."""
    files: int = 0
    """Pages of weight files from which a model is being converted. They count as the process's memory, but the system
    takes them back where it needs them."""
    process: int = 0
    """What the process holds besides tensors: Python, libraries, tokenizer, rows."""
    moment: str = "loading"
    """Which moment that is: ``loading``, ``evaluating`` or ``training``."""

    @property
    def total(self) -> int:
        """All of it, in bytes: the largest resident memory that the process will have."""
        return self.needed + self.files + self.process

    @property
    def needed(self) -> int:
        """What the process will need beyond what it holds already, in bytes."""
        tensors = self.weights + self.adapters + self.gradients + self.optimiser + self.activations
        return tensors + self.fragmentation

    def parts(self) -> dict[str, int]:
        """Bytes by name, without the parts that are nothing."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}
        return {name: size for name, size in named.items() if size}

    @property
    def told(self) -> str:
        """What is needed, in words: ``weights 0.25, activations 0.73`` (GiB)."""
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts().items() if name not in NO_ROOM)


@dataclass(frozen=True)
class RunMemory:
    """The estimates of a run's moments: loading, evaluating, training.

    ``uncounted``: why the activations could not be counted, where that is so. ``attached``: what the plan does to the
    model. ``host``: where the moments are an accelerator's, what loading takes in the machine's own memory.
    """

    moments: tuple[MemoryEstimate, ...]
    attached: AttachReport
    uncounted: str | None = None
    host: MemoryEstimate | None = None

    @property
    def peak(self) -> MemoryEstimate:
        """The estimate of the moment at which the process is largest."""
        return max(self.moments, key=lambda estimate: estimate.total)

    @property
    def hardest(self) -> MemoryEstimate:
        """The estimate of the moment that needs most beyond what the process holds already."""
        return max(self.moments, key=lambda estimate: estimate.needed)


def estimate_run(job: Job, sizes: RowSizes) -> RunMemory:
    """What a run of ``job`` over rows of ``sizes`` will take where it computes.

    A step of the run's own code is traced on tensors without values (``trimtab.memory.trace``). On the processor, what
    the process holds besides tensors is what it holds now and ``BEYOND``. On an accelerator tensors alone are counted;
    what its allocator holds free between them has not been measured. This takes a second or two, whatever the size of
    the model.

    Raises:
        ModelError, PlanError: what the run itself would raise for its model and its plan.
    """
    config, of_model, dtype = job.config, job.files, job.dtype
    train = config.train
    evaluated = _evaluated(config, sizes)
    model: Any = empty_model(of_model, dtype, config.model.attention)
    said = None if of_model.source.kind == "gguf" else of_model.config.dtype
    stored = getattr(torch, said) if isinstance(said, str) else said or torch.float32
    parameters = sum(parameter.numel() for parameter in model.parameters())
    packed = stored_sizes(model, config.quantisation)
    # A weight that is quantised is read through a map of its own, which is given back with it.
    files = stored.itemsize * sum(one.numel() for one in model.parameters() if id(one) not in packed)
    task = tasks.of(job)
    quantising = quantising_bytes(model, config.quantisation)
    attached = job.attach_to(model)
    where = job.device
    trace = Trace(model, task, quantisation=config.quantisation, device=where)
    standing, uncounted = trace.standing, None
    labels = sizes.length - 1 if train.prompt_loss_weight else sizes.labels
    rows = max(1, train.batch_size // here().size)
    batch = Batch(rows, sizes.length, rows * labels, sizes.shape, packed=train.padding_free is True)
    try:
        peaks = trace.run(
            batch,
            gradient_checkpointing=train.gradient_checkpointing,
            accumulates=train.gradient_accumulation > 1,
            averages=train.average is not None,
            evaluated=evaluated,
            generates=sizes.generates,
        )
    except Exception as error:  # a model's code may ask for a value, and then fail in any way
        peaks = {"training": standing}
        uncounted = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}"
    process = psutil.Process().memory_info().rss + BEYOND
    # Weights that stay in the type of their files are used from the mapped file and never copied.
    is_mapped = stored == dtype and config.quantisation == "none"
    files = 0 if is_mapped else files
    host = None
    if where.type != "cpu":  # weights come through the machine's memory, but for those that are packed one by one
        whole = sum(one.nbytes for one in model.parameters() if not one.requires_grad and id(one) not in packed)
        host = MemoryEstimate(0 if is_mapped else whole, files=files, process=process)
        files = process = 0
    loading = MemoryEstimate(standing["weights"], files=files, process=process)
    moments = [replace(loading, activations=quantising)]
    for moment, held in peaks.items():
        scored = (evaluated if moment == "evaluating" and evaluated else batch).labels
        logits = 4 * task.logits_at_once(model, scored)
        passing = held.get("activations", 0) + held.get("gradients", 0)
        holes = _holes(passing, logits, parameters) if host is None else 0
        moments.append(MemoryEstimate(**held, fragmentation=holes, process=process, moment=moment))
    return RunMemory(tuple(moments), attached, uncounted, host)


def _holes(passing: int, logits: int, parameters: int) -> int:
    """Bytes that the processor's allocator holds free where so many come and go, among them blocks of ``logits``, in a
    model of so many ``parameters``."""
    holes = SHARE * passing
    if 0 < logits < RETURNED:  # else the system takes such a block back
        holes += min(HOLES, 4 * parameters) + PER_LOGITS * logits
    return round(holes)


def _evaluated(config: RunConfig, sizes: RowSizes) -> Batch | None:
    if not sizes.evaluated:
        return None
    length, labels = sizes.tested or sizes.length, sizes.tested_labels or sizes.labels
    rows = max(1, min(config.evaluation.batch_size, TOKENS // length))
    return Batch(rows, length, rows * labels, sizes.shape)


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
    memory, sharing = estimate_run(job, sizes), _sharing(job)
    estimate, what = memory.hardest, f"Training {job.config.model.name}"
    if sharing > 1:
        what += f" in {sharing} processes on this machine ({estimate.needed / GIB:.2f} GiB each)"

    def advice(free: int) -> list[str]:
        fitting = [str(suggestion) for suggestion in suggest(job, sizes, free // sharing)] or ["a smaller model"]
        return [*fitting, "fewer processes"] if sharing > 1 else fitting

    check_fits(what, estimate.needed * sharing, job.device, parts=estimate.told, advice=advice)
    if memory.host is not None:
        needed = memory.host.needed * here().local
        check_fits(f"Loading {job.config.model.name}", needed, parts=memory.host.told)
    return memory.attached


def suggest(job: Job, sizes: RowSizes, free: int) -> list[Suggestion]:
    """Changes that make a run fit into ``free`` bytes a process, each estimated by itself; first those that alter its
    results least.

    Of each kind of change, the mildest that fits is given. Only where no single change is enough are several tried
    together.
    """

    def fitting(change: Change) -> Suggestion | None:
        memory = _with(job, sizes, change)
        return Suggestion(change, memory) if memory.hardest.needed <= free else None

    for ladders in _attempts(job, sizes):
        enough = []
        for *milder, strongest in filter(None, ladders):
            # Where the strongest change is not enough, the milder ones need not be looked at.
            if last := fitting(strongest):
                enough.append(next((fits for change in milder if (fits := fitting(change))), last))
        if enough:
            return enough
    return []


def _sharing(job: Job) -> int:
    """How many processes take of one memory: all on this machine, where they have no accelerator each."""
    return here().local if job.device.type == "cpu" else 1


def room(job: Job) -> int:
    """Bytes that are free for each process."""
    return available_memory(job.device) // _sharing(job)


def _attempts(job: Job, sizes: RowSizes) -> Iterator[list[list[Change]]]:
    """Ladders of changes, each from mild to strong: first of single changes, then of more and more at once."""
    config, train = job.config, job.config.train
    recompute: Change = {} if train.gradient_checkpointing else {"train.gradient_checkpointing": True}
    halve: Change = {} if job.precision != "float32" else {"train.precision": "bfloat16"}
    smaller = list(_smaller_batches(train.batch_size, train.gradient_accumulation))
    kinds = [] if config.quantisation != "none" or job.trains_base else bases.quantised_by_size()
    packed: list[Change] = [{"quantisation": kind} for kind in kinds]
    rows_at_once = _halves(config.evaluation.batch_size) if sizes.evaluated else ()
    few: list[Change] = [{"evaluation.batch_size": rows} for rows in rows_at_once]
    together = [change for change in (recompute, halve) if change]
    yield [few, *([change] for change in together), smaller, packed]
    both: Change = {**recompute, **halve}
    if both:
        yield [[both], [{**both, **batch} for batch in smaller], [{**both, **kind} for kind in packed]]
    least: Change = {**both, **(packed[-1] if packed else {})}
    if packed:
        yield [[{**least, **batch} for batch in smaller]]
    least = {**least, **(smaller[-1] if smaller else {})}
    if few:
        least = {**least, **few[-1]}
        yield [[least]]
    yield [[{**least, "data.max_length": length} for length in _shorter(sizes.length)]]


def _smaller_batches(rows: int, accumulation: int) -> Iterator[Change]:
    """Half the rows, then half of those, and so on, with as many more passes to a step."""
    for size in _halves(rows):
        yield {"train.batch_size": size, "train.gradient_accumulation": -(-rows * accumulation // size)}


def _halves(rows: int) -> Iterator[int]:
    while rows > 1:
        rows //= 2
        yield rows


def _shorter(length: int) -> Iterator[int]:
    while (length := length // 2) >= SHORTEST:
        yield length


def _with(job: Job, sizes: RowSizes, change: Change) -> RunMemory:
    """The estimate after ``change``."""
    config = job.config
    changed: dict[str, Any] = {}
    for name in ("train", "evaluation"):
        said = {key.removeprefix(f"{name}."): value for key, value in change.items() if key.startswith(f"{name}.")}
        changed[name] = getattr(config, name).model_copy(update=said)
    if (quantisation := change.get("quantisation")) is not None:
        changed["quantisation"] = quantisation
    config = config.model_copy(update=changed)
    if (length := change.get("data.max_length")) is not None:
        sizes = replace(sizes, length=length, labels=min(sizes.labels, length - 1))
    return estimate_run(replace(Job.of(config), task=job.task, files=job.files), sizes)
