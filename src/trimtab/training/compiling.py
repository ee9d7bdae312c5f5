"""Blocks under ``torch.compile`` while training, where that pays.

Compiling fuses what lies between the matrix products, and costs a minute or more before the first step is faster. So
``auto`` takes a few plain steps first, compiles if the rest of the run is long enough to win the time back, and goes on
plainly if the compiled blocks then prove no faster: with batches of many lengths they are not. A block that the
compiler cannot take runs as it is; validation and evaluation always do, since the compiler would have to start
again for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.surgery.adapted import Adapted, bare
from trimtab.training.listener import Listener
from trimtab.training.pace import Lap, Pace

COMPILE_SECONDS = 120.0
"""What compiling is counted as. One kind of block took some 40 s on one core for one shape; batches of other lengths
come on top."""
GAIN = 0.15
"""The share of a plain step that it is counted on to save. ``benchmarks/step.py --compile`` gave 0.16 (LoRA) and 0.23
(DoRA) for SmolLM2's blocks in bfloat16, 1,024 tokens of one shape."""
WARM_UP, TIMED = 2, 4
"""Plain steps that are not timed, and those that are."""
SETTLING, COMPARED = 12, 12
"""The same of compiled steps: the first ones compile, and compile again for other lengths."""
BACKEND = "inductor"


def block_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of repeated blocks of ``model``: those of children of one kind, the outermost of each place."""
    for module in model.children():
        if isinstance(module, nn.ModuleList) and len({type(bare(child)) for child in module}) == 1:
            yield module
        else:
            yield from block_lists(module)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of ``model`` in those lists that hold adapters."""
    adapted = (blocks for blocks in block_lists(model) if any(isinstance(inner, Adapted) for inner in blocks.modules()))
    return [block for blocks in adapted for block in blocks]


def pays(seconds_per_step: float, steps_left: int) -> bool:
    """Whether the time that compiling saves in the rest of a run is more than it costs."""
    return GAIN * seconds_per_step * steps_left > COMPILE_SECONDS


class Compiling(TrainerCallback):
    """Compiles the blocks of ``model``: at once (True), once it pays and as long as it is faster (``auto``), or not at
    all (False)."""

    def __init__(self, model: nn.Module, setting: Literal["auto"] | bool, listener: Listener, pace: Pace) -> None:
        self._model = model
        self._setting = setting
        self._listener = listener
        self._lap = Lap(pace)
        self._measuring = False
        self._first = 0
        self._plain = 0.0  # tokens a second
        self._suppressed = False
        self.compiled: list[nn.Module] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first = state.global_step
        if self._setting is True:
            self._compile("compiling the blocks: the first steps take a minute or more")
        self._measuring = self._setting == "auto"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._measuring:
            return
        done = state.global_step - self._first
        if done in (WARM_UP, WARM_UP + TIMED + SETTLING):
            self._lap.read()
        elif done == WARM_UP + TIMED:
            (tokens, seconds), left = self._lap.read(), state.max_steps - state.global_step
            self._plain = tokens / seconds
            if pays(seconds / TIMED, left):
                minutes = seconds / TIMED * left / 60
                self._compile(f"compiling the blocks, since {minutes:.0f} minutes of training are left")
            self._measuring = bool(self.compiled)
        elif done == WARM_UP + TIMED + SETTLING + COMPARED:
            tokens, seconds = self._lap.read()
            if tokens / seconds <= self._plain:
                self._listener.note(
                    f"compiled blocks are no faster here ({tokens / seconds:.0f} tokens/s, plain ones "
                    f"{self._plain:.0f}): going on with plain ones"
                )
                self._undo()
            self._measuring = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._undo()

    def _undo(self) -> None:
        if self.compiled:
            torch._dynamo.config.suppress_errors = self._suppressed
        for block in self.compiled:
            block._compiled_call_impl = None
        self.compiled = []

    def _compile(self, word: str) -> None:
        blocks = blocks_of(self._model)
        if not blocks:
            if self._setting is True:
                self._listener.note("train.compile: the model has no repeated blocks; it runs as it is")
            return
        self._listener.note(word)
        self._suppressed = torch._dynamo.config.suppress_errors
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs plainly
        for block in blocks:
            block.compile(dynamic=True, backend=BACKEND)
        self.compiled = blocks


@contextmanager
def plainly() -> Iterator[None]:
    """A context in which compiled blocks run as they are."""
    with torch.compiler.set_stance("force_eager"):
        yield
