"""Blocks under ``torch.compile`` while training.

Compiling fuses what lies between the matrix products, and costs a minute or so. `choose` decides whether that pays,
from counts alone (weights, tokens, steps, cores) and never from a clock: compiled blocks round otherwise than plain
ones, so a run repeats itself only if it decides the same again, also when it is resumed.

A block is compiled once for batches of all sizes; where the compiler fails, all blocks go on as they are. Validation
and evaluation always run plainly, since the compiler would have to start again for them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.config.resolve import Job
from trimtab.ops.cost import expected
from trimtab.processes import here
from trimtab.runs.events import Listener
from trimtab.surgery.adapted import Adapted, block_lists
from trimtab.surgery.attach_report import AttachReport, usually_frozen
from trimtab.tasks import Inputs

WORK = {"eager": 0.17e14, "other": 0.65e14}
"""Multiplications and additions a core, by the kind of attention, that save as much time as compiling takes, some 50 s
of one core. With eager attention on short rows compiled blocks took 378 s in place of 495, compiling included, for
0.6e14 a core (``benchmarks/finance.py``); else they save 8 to 20 % of a step (``benchmarks/step.py --compile``), on
cores that do 1 to 2e11 a second."""
ENOUGH = 3
"""So many times the time of compiling is to be saved: what it is on another machine is not known."""
PER_WEIGHT = 4
"""Multiplications and additions a token: two with each weight in the forward pass, and two for the gradient of its
input. (A frozen weight has none of its own.)"""
METHODS = ("lora", "dora")
"""What compiled blocks take less time with. With MoRA they are as fast as plain ones, and are compiled four times as
long."""


@dataclass(frozen=True)
class CompileChoice:
    """Whether to compile.

    Attributes:
        compiles: the decision.
        tokens: of a usual batch, for which the blocks are compiled first.
        why: a sentence on what was decided, and why.
        pays: whether the run is long enough, so that the user may want to know the reason if it is not done.
    """

    compiles: bool
    tokens: int
    why: str
    pays: bool


def choose(job: Job, inputs: Inputs, attached: AttachReport) -> CompileChoice:
    """What a run of ``job`` on ``inputs`` does, with what its plan attaches to its model."""
    config, train = job.config, job.config.train
    lengths = inputs.rows.lengths
    tokens = round(sum(lengths) / max(1, len(lengths)) * train.batch_size)
    if train.compile != "auto":
        return CompileChoice(train.compile, tokens, f"train.compile: {str(train.compile).lower()}, as you say", False)
    steps = train.total_steps(len(lengths)) if train.epochs else 0
    step = tokens * train.gradient_accumulation
    times = won_back(attached, step * steps, config.model.attention)
    counts = f"{steps:,} steps of {step:,} tokens win the compiler's minute back {times:.1f} times"
    if times < ENOUGH:
        return CompileChoice(False, tokens, f"train.compile: auto does not compile: {counts}, of {ENOUGH}", False)
    if reason := _obstacle(job, attached):
        return CompileChoice(False, tokens, f"train.compile: auto does not compile: {reason}", True)
    return CompileChoice(True, tokens, f"train.compile: auto compiles the blocks: {counts}", True)


def won_back(attached: AttachReport, tokens: int, attention: str) -> float:
    """How many times the time that compiling takes is saved by a run on so many ``tokens`` in all, in steps whose cost
    is that of the weights that ``attached`` has reached or could have."""
    unreached = sum(numbers for kind, numbers in attached.unreached.items() if not usually_frozen(kind))
    weights = sum(module.out_features * module.in_features for module in attached.modules) + unreached
    a_core = PER_WEIGHT * weights * tokens / torch.get_num_threads()
    return a_core / WORK["eager" if attention == "eager" else "other"]


def _obstacle(job: Job, attached: AttachReport) -> str | None:
    """Why blocks are not compiled by themselves, though it would pay."""
    train, kind = job.config.train, job.device.type
    others = sorted({module.method for module in attached.modules} - set(METHODS))
    if kind != "cpu":
        return f"it was measured on processors, and this is {kind}; train.compile: true tries it"
    if here().size > 1:
        return f"it was measured in one process, and these are {here().size}; train.compile: true tries it"
    if job.task != "causal_lm":
        return f"it was measured with task: causal_lm, and this is {job.task}; train.compile: true tries it"
    if others:
        return f"it gains with {' and '.join(METHODS)}, and this trains {', '.join(others)}; true compiles all the same"
    if train.gradient_checkpointing:
        return "it was measured without train.gradient_checkpointing; train.compile: true tries it"
    if train.padding_free is True:
        return "it was measured without train.padding_free; train.compile: true tries it"
    if sys.platform != "linux":
        return f"it was measured on Linux, and this is {sys.platform}; train.compile: true tries it"
    if not shutil.which(compiler := os.environ.get("CXX") or "g++"):
        return f"there is no C++ compiler ({compiler}) on this machine; with one, steps take less time"
    return None


BACKEND = "inductor"
SETTINGS = {
    "specialize_float": True,  # sizes vary from batch to batch, constants do not: unknown, they cannot be compiled
    "recompile_limit": 32,  # the first block, whose input wants no gradient, is another graph; so is each kind of block
}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of ``model`` in those lists that hold adapters."""
    adapted = (blocks for blocks in block_lists(model) if any(isinstance(inner, Adapted) for inner in blocks.modules()))
    return [block for blocks in adapted for block in blocks]


class Compiling(TrainerCallback):
    """Compiles the blocks of ``model`` while it trains, for batches of ``tokens`` and others; they are plain again
    afterwards."""

    def __init__(self, model: nn.Module, tokens: int, listener: Listener) -> None:
        self._model, self._tokens, self._listener = model, tokens, listener
        self._settings = ExitStack()
        self.compiled: list[nn.Module] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        blocks = blocks_of(self._model)
        if not blocks:
            self._listener.note("train.compile: the model has no repeated blocks; it runs as it is")
            return
        self._listener.note("compiling the blocks: the first steps take a minute or so")
        self._settings.enter_context(torch._dynamo.config.patch(SETTINGS))
        self._settings.enter_context(expected(self._tokens))
        # So that what fails fails in the forward pass, where there is a way back.
        self._settings.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        for block in blocks:
            block._compiled_call_impl = self._tried(block)
        self.compiled = blocks

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._undo()

    def _undo(self) -> None:
        self._settings.close()
        for block in self.compiled:
            block._compiled_call_impl = None
        self.compiled = []

    def _tried(self, block: nn.Module) -> Callable[..., Any]:
        """The call of ``block``, compiled; all blocks go back to plain ones where the compiler fails."""
        compiled = torch.compile(block._call_impl, dynamic=True, backend=BACKEND)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                reason = " ".join(str(error).strip().partition("\n\n")[0].split())
                self._listener.note(f"the blocks cannot be compiled ({reason}): going on with plain ones")
                self._undo()
                return block._call_impl(*args, **kwargs)

        return call


@contextmanager
def plainly() -> Iterator[None]:
    """A context in which compiled blocks run as they are."""
    with torch.compiler.set_stance("force_eager"):
        yield
