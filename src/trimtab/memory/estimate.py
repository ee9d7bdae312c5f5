"""The memory of a run, estimated before anything of it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import psutil
import torch

from trimtab import tasks
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.data.batches import TOKENS
from trimtab.machine import GIB
from trimtab.memory.trace import Trace
from trimtab.models.load import empty_model, load_config_only
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
    uncounted: str | None = None
    attached: AttachReport | None = None
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
    config, source, dtype = job.config, job.source, job.dtype
    train = config.train
    evaluated = _evaluated(config, sizes)
    model: Any = empty_model(source, dtype, config.model.attention)
    said = None if source.kind == "gguf" else load_config_only(source).dtype
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
        holes = SHARE * passing
        # Blocks of logits that come and go between the small ones leave more, unless the system takes them back.
        if host is not None:
            holes = 0.0
        elif 0 < logits < RETURNED:
            holes += min(HOLES, 4 * parameters) + PER_LOGITS * logits
        moments.append(MemoryEstimate(**held, fragmentation=round(holes), process=process, moment=moment))
    return RunMemory(tuple(moments), uncounted, attached, host)


def _evaluated(config: RunConfig, sizes: RowSizes) -> Batch | None:
    if not sizes.evaluated:
        return None
    rows = max(1, min(config.evaluation.batch_size, TOKENS // sizes.length))
    return Batch(rows, sizes.length, rows * sizes.labels, sizes.shape)
