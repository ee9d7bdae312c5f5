"""Blocks under ``torch.compile`` while training.

Compiling fuses what lies between the matrix products, and costs a minute or so (`compile_choice` says when that pays).
A block is compiled once for batches of all sizes; where the compiler fails, all blocks go on as they are. Validation
and evaluation always run plainly, since the compiler would have to start again for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.ops.cost import expected
from trimtab.runs.events import Listener
from trimtab.surgery.adapted import Adapted, block_lists

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
