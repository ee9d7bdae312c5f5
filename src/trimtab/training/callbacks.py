"""What watches the loop: the one who tells the listener, and the one who ends the run in good order on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.runs.events import Listener


class Telling(TrainerCallback):
    """Tells the listener of beginnings, steps and the end."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._listener.training_began(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._listener.step(state.global_step, state.max_steps)


class Interrupting(TrainerCallback):
    """Ends training after the step at hand, with a checkpoint, once ``asked`` is set.

    A validation that is due at that step is made first: a resumed run would not come back to it.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control

    @contextmanager
    def on_signal(self, listener: Listener) -> Iterator[None]:
        """While open, the first SIGINT or SIGTERM asks for a good end, and the second one is obeyed at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            with suppress(RuntimeError):  # the signal came in the middle of a write to the same stream
                listener.note("interrupted: finishing this step and saving a checkpoint (again: stop at once)")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
