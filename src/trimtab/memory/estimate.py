"""The memory of a run, estimated before anything of it is loaded, and what would make it less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from trimtab.config.resolve import model_dtype_of, plan_of, source_of
from trimtab.config.run import RunConfig
from trimtab.data.tokens import IGNORED
from trimtab.evaluation.batching import TOKENS
from trimtab.memory.room import MemoryEstimate
from trimtab.memory.trace import Batch, Trace
from trimtab.models.load import empty_model, load_config_only
from trimtab.surgery.attach import attach
from trimtab.tasks import Inputs

LATER = 15 * 2**20
"""Bytes that a run's process holds at its peak besides tensors and what it held when the estimate was made."""

HOLES, SHARE = 350 * 2**20, 0.2
"""glibc's free memory between tensors while a model runs: so much (of a small model, no more than it has weights), and
this share of the activations. Fitted to the runs of ``benchmarks/memory.py``. Giving freed memory back at once avoids
it, and made a step take nearly half as long again."""


@dataclass(frozen=True)
class RowSizes:
    """What of a run's rows decides its memory.

    Attributes:
        length: tokens of the longest row.
        labels: positions of such a row that carry loss.
        evaluated: whether there are validation or test rows.
        generates: whether their answers are generated.
    """

    length: int
    labels: int
    evaluated: bool = False
    generates: bool = False

    @classmethod
    def of(cls, config: RunConfig, inputs: Inputs) -> RowSizes:
        """Of rows that have been read."""
        lengths = inputs.rows.lengths
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[: config.train.batch_size]
        labels = sum(label != IGNORED for row in longest for label in inputs.rows[row]["labels"])
        tested = [example for rows in inputs.tests.values() for example in rows]
        return cls(
            max(lengths),
            math.ceil(labels / len(longest)),
            bool(inputs.validation or tested),
            not inputs.scored and any(example.answer is not None for example in tested),
        )


@dataclass(frozen=True)
class RunMemory:
    """The estimates of a run's moments: loading, evaluating, training.

    ``uncounted``: why the activations could not be counted, where that is so.
    """

    moments: tuple[MemoryEstimate, ...]
    uncounted: str | None = None

    @property
    def peak(self) -> MemoryEstimate:
        """That of the moment when the process is largest."""
        return max(self.moments, key=lambda estimate: estimate.total)

    @property
    def hardest(self) -> MemoryEstimate:
        """That of the moment which needs most beyond what the process holds already."""
        return max(self.moments, key=lambda estimate: estimate.needed)


def estimate_run(config: RunConfig, sizes: RowSizes) -> RunMemory:
    """What a run of ``config`` over rows of ``sizes`` will take on the processor.

    A step of the run's own code is traced on tensors without values (``trimtab.memory.trace``); the process's own
    part is what it holds now. Takes a fraction of a second to a few seconds, whatever the size of the model.

    Raises:
        ModelError, PlanError: what the run itself would raise for its model and its plan.
    """
    train, source = config.train, source_of(config)
    dtype: torch.dtype = getattr(torch, model_dtype_of(config))
    model: Any = empty_model(source, dtype, config.model.attention)
    said = None if source.kind == "gguf" else load_config_only(source).dtype
    stored = getattr(torch, said) if isinstance(said, str) else said or torch.float32
    parameters = sum(parameter.numel() for parameter in model.parameters())
    files = parameters * stored.itemsize
    attach(model, plan_of(config))
    trace = Trace(model, quantisation=config.quantisation)
    standing, uncounted = trace.standing, None
    labels = sizes.length - 1 if train.prompt_loss_weight else sizes.labels
    try:
        peaks = trace.run(
            Batch(train.batch_size, sizes.length, train.batch_size * labels),
            gradient_checkpointing=train.gradient_checkpointing,
            accumulates=train.gradient_accumulation > 1,
            averages=train.average is not None,
            evaluated=_evaluated(config, sizes),
            generates=sizes.generates,
        )
    except Exception as error:  # a model's code may ask for values in whatever way, and then fail in whatever way
        peaks = {"training": standing}
        uncounted = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}"
    process = psutil.Process().memory_info().rss + LATER
    # Weights of the type they are stored in are used where the file is mapped, and never copied.
    is_mapped = stored == dtype and config.quantisation == "none"
    moments = [MemoryEstimate(standing["weights"], files=0 if is_mapped else files, process=process)]
    for moment, found in peaks.items():
        holes = min(HOLES, 4 * parameters) + round(SHARE * found.get("activations", 0))
        moments.append(MemoryEstimate(**found, fragmentation=holes, process=process, moment=moment))
    return RunMemory(tuple(moments), uncounted)


def _evaluated(config: RunConfig, sizes: RowSizes) -> Batch | None:
    if not sizes.evaluated:
        return None
    rows = max(1, min(config.evaluation.batch_size, TOKENS // sizes.length))
    return Batch(rows, sizes.length, rows * sizes.labels)
