"""What watches the loop of training: it tells the listener, ends a run in good order, and averages the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.errors import Terminated
from trimtab.files import write_atomically, write_tensors
from trimtab.processes import here
from trimtab.runs.checkpoints import step_of
from trimtab.runs.events import Listener
from trimtab.surgery.adapted import adapted_modules
from trimtab.surgery.attach import trainable_parameters

AVERAGE_FILE = "average.safetensors"


class Telling(TrainerCallback):
    """Tells the listener of beginnings, steps and the end."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._listener.training_began(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._listener.step(state.global_step, state.max_steps)


class Trying(TrainerCallback):
    """Tells the listener how far a trial at ``rate`` has come."""

    def __init__(self, listener: Listener, rate: float) -> None:
        self._listener, self._rate = listener, rate

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._listener.trying(self._rate, 0, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._listener.trying(self._rate, state.global_step, state.max_steps)


class Idle(TrainerCallback):
    """Watches which adapted modules no step has reached: what they compute is no part of any loss."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(adapted_modules(model))
        self._left = {name: one for name, one in modules.items() if any(True for _ in one.current_adapter.parameters())}
        self._steps = 0

    @property
    def names(self) -> list[str]:
        """The names of these modules; none before the first step."""
        return list(self._left) if self._steps else []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        self._steps = state.global_step
        self._keep(lambda parameter: parameter not in optimizer.state)  # what the steps before a resume have reached

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._steps += 1
        self._keep(lambda parameter: parameter.grad is None)

    def _keep(self, unreached: Callable[[nn.Parameter], bool]) -> None:
        """Watch on those modules alone all of whose parameters are ``unreached``."""
        self._left = {
            name: module
            for name, module in self._left.items()
            if all(map(unreached, module.current_adapter.parameters()))
        }


class LastLoss(TrainerCallback):
    """Has the loss written down at the last step, wherever that falls between two lines of metrics; and, where training
    may stop early, at every validation, since each may be the last."""

    def __init__(self, *, stops_early: bool) -> None:
        self._stops_early = stops_early

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps or (self._stops_early and control.should_evaluate):
            control.should_log = True
        return control


class Interrupting(TrainerCallback):
    """Ends training after the step at hand, with a checkpoint, once it was asked for (in any process of the run).

    A validation that is due at that step is made first: a resumed run would not come back to it.

    Attributes:
        stop: what the signal that asked for it would have raised; None: nothing was asked for.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.stop: KeyboardInterrupt | Terminated | None = None

    def ask(self, stop: KeyboardInterrupt | Terminated) -> None:
        """Ask for a good end."""
        self.stop = stop
        with suppress(RuntimeError):  # the signal came in the middle of a write to the same stream
            self._listener.note("interrupted: finishing this step and saving a checkpoint (again: stop at once)")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        asked = here().gathered(None if self.stop is None else isinstance(self.stop, Terminated))
        if any(one is not None for one in asked):
            if self.stop is None:
                self.ask(Terminated() if any(asked) else KeyboardInterrupt())
            control.should_save = True
            control.should_training_stop = True
        return control


class Averaging(TrainerCallback):
    """Keeps the mean of the trained tensors over the last ``fraction`` of all steps; with 0 it does nothing.

    The steps near the end wander about a good place, and their mean lies nearer to it than the last of them does
    (stochastic weight averaging, arXiv 1803.05407). It costs one copy of the adapter.

    Attributes:
        count: of how many steps there is a mean.
    """

    def __init__(self, model: nn.Module, fraction: float) -> None:
        self._parameters = trainable_parameters(model)
        self._fraction = fraction
        self._means: dict[str, torch.Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._fraction or state.global_step <= self._begins(state.max_steps):
            return
        if not self.count:
            self._means = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.count += 1
        means = [self._means[name] for name in self._parameters]
        torch._foreach_lerp_(means, list(self._parameters.values()), 1 / self.count)

    def _begins(self, steps: int) -> int:
        """After which of ``steps`` steps the mean is taken."""
        return round((1 - self._fraction) * steps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model carries the mean (if there is one yet) in place of its latest values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def keep(self) -> None:
        """Leave the mean on the model for good."""
        self._swap()
        self._means, self.count = {}, 0

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self._means.items():
            latest = self._parameters[name].detach().clone()
            self._parameters[name].copy_(mean)
            mean.copy_(latest)

    def save(self, folder: Path) -> None:
        """Write the mean into a checkpoint."""
        if self.count:
            metadata = {"count": str(self.count)}
            write_atomically(folder / AVERAGE_FILE, lambda path: write_tensors(path, self._means, metadata))

    def load(self, folder: Path, steps: int) -> None:
        """Take the mean of a checkpoint, if it has one that is of the last part of ``steps`` steps: a run that goes on
        for longer than it was to begins to average later."""
        if (folder / AVERAGE_FILE).is_file() and step_of(folder) > self._begins(steps):
            with safe_open(folder / AVERAGE_FILE, framework="pt") as stored:
                self.count = int(stored.metadata()["count"])
                self._means = {
                    name: stored.get_tensor(name).to(parameter.device) for name, parameter in self._parameters.items()
                }
