"""Blocks under ``torch.compile`` while training, where that pays.

Compiling fuses what lies between the matrix products, and costs a minute or so before the first step is faster. So
``auto`` takes a few plain steps first, compiles if the rest of the run is long enough to win the time back, and goes on
plainly if the compiled blocks then prove no faster. A block is compiled once for batches of all sizes; where the
compiler fails, all blocks go on as they are. Validation and evaluation always run plainly, since the compiler would
have to start again for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.ops.cost import expected
from trimtab.runs.events import Listener
from trimtab.surgery.adapted import Adapted, block_lists
from trimtab.training.metrics_log import Lap, Throughput

COMPILE_SECONDS = 90.0
"""What compiling is counted as. SmolLM2's blocks, of one kind, took some 45 s on one busy core."""
GAIN = 0.15
"""The share of a plain step that it is counted on to save. ``benchmarks/step.py --compile`` and
``benchmarks/finance.py`` gave 0.20 to 0.31 in bfloat16, 0.08 to 0.14 in float32, of LoRA's and DoRA's steps."""
WARM_UP, TIMED = 2, 4
"""Plain steps that are not timed, and those that are."""
SETTLING, COMPARED = 12, 12
"""The same of compiled steps: the first one compiles, and a later one where a batch is unlike it."""
BACKEND = "inductor"
SETTINGS = {
    "specialize_float": True,  # sizes vary from batch to batch, constants do not: unknown, they cannot be compiled
    "recompile_limit": 32,  # the first block, whose input wants no gradient, is another graph; so is each kind of block
}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of ``model`` in those lists that hold adapters."""
    adapted = (blocks for blocks in block_lists(model) if any(isinstance(inner, Adapted) for inner in blocks.modules()))
    return [block for blocks in adapted for block in blocks]


def pays(seconds_per_step: float, steps_left: int) -> bool:
    """Whether the time that compiling saves in the rest of a run is more than it costs."""
    return GAIN * seconds_per_step * steps_left > COMPILE_SECONDS


class Compiling(TrainerCallback):
    """Compiles the blocks of ``model`` after a few steps: in any case (True), where it pays and as long as it is faster
    (``auto``), or not at all (False)."""

    def __init__(
        self, model: nn.Module, setting: Literal["auto"] | bool, listener: Listener, throughput: Throughput
    ) -> None:
        self._model = model
        self._setting = setting
        self._listener = listener
        self._lap = Lap(throughput)
        self._measuring = False
        self._first = 0
        self._plain = 0.0  # tokens a second
        self._settings = ExitStack()
        self.compiled: list[nn.Module] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first = state.global_step
        self._measuring = self._setting is not False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._measuring:
            return
        done = state.global_step - self._first
        if done in (WARM_UP, WARM_UP + TIMED + SETTLING):
            self._lap.read()
        elif done == WARM_UP + TIMED:
            (tokens, seconds), left = self._lap.read(), state.max_steps - state.global_step
            self._plain = tokens / seconds
            if self._setting is True or pays(seconds / TIMED, left):
                self._compile(seconds / TIMED * left / 60, tokens // (TIMED * args.gradient_accumulation_steps))
            self._measuring = self._setting == "auto" and bool(self.compiled)
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
        self._settings.close()
        for block in self.compiled:
            block._compiled_call_impl = None
        self.compiled = []

    def _compile(self, minutes: float, tokens: int) -> None:
        """Compile the blocks, with ``minutes`` of training left, for batches of ``tokens`` and others."""
        blocks = blocks_of(self._model)
        if not blocks:
            if self._setting is True:
                self._listener.note("train.compile: the model has no repeated blocks; it runs as it is")
            return
        self._listener.note(
            f"compiling the blocks, with {minutes:.0f} minutes of training left: the next steps take a minute or so"
        )
        self._settings.enter_context(torch._dynamo.config.patch(SETTINGS))
        self._settings.enter_context(expected(tokens))
        # So that what fails fails in the forward pass, where there is a way back.
        self._settings.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        for block in blocks:
            block._compiled_call_impl = self._tried(block)
        self.compiled = blocks

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
                self._measuring = False
                return block._call_impl(*args, **kwargs)

        return call


@contextmanager
def plainly() -> Iterator[None]:
    """A context in which compiled blocks run as they are."""
    with torch.compiler.set_stance("force_eager"):
        yield
