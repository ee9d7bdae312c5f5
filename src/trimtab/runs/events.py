"""What a run tells whoever started it. The command line draws it; a program may listen or not."""

from __future__ import annotations

from typing import Any


class Listener:
    """Receives what happens in a run. Every method does nothing here; override those of interest."""

    def stage(self, text: str) -> None:
        """A new part of the run begins, such as loading the model."""

    def note(self, text: str) -> None:
        """A fact worth a line: what was recognised, how far it has come."""

    def remark(self, text: str) -> None:
        """What the user should know, and may want to change: it is kept in the run's records and shown in its report
        (see `trimtab.notes`)."""

    def show(self, renderable: Any) -> None:
        """Something to look at: a rich renderable."""

    def counting(self, what: str) -> None:
        """What the speed of training is counted in, where that is not tokens: pictures."""

    def training_began(self, step: int, steps: int) -> None:
        """Training starts at ``step`` (not 0 after a resume) of ``steps``."""

    def step(self, step: int, steps: int) -> None:
        """An optimiser step was made."""

    def metrics(self, row: dict[str, Any]) -> None:
        """A line was added to ``metrics.jsonl``."""

    def training_ended(self) -> None:
        """Training is over, finished or interrupted."""

    def evaluated(self, result: dict[str, Any]) -> None:
        """A test set is evaluated; ``result`` is what its file in the run folder holds."""

    def trying(self, rate: float, step: int, steps: int) -> None:
        """``step`` of the ``steps`` of a trial of ``train.learning_rate: auto`` at ``rate`` are made."""

    def evaluating(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` rows of the set called ``name`` are evaluated."""


TOLD: dict[str, tuple[type, ...]] = {
    "stage": (str,),
    "note": (str,),
    "counting": (str,),
    "training_began": (int, int),
    "step": (int, int),
    "metrics": (dict,),
    "training_ended": (),
    "evaluated": (dict,),
    "evaluating": (str, int, int),
    "trying": (float, int, int),
}
"""The methods that are called where another process does the run, and the types of their arguments."""


class Steps(Listener):
    """Passes on to ``listener`` how training goes, and keeps the rest of what one run of many would tell."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def counting(self, what: str) -> None:
        self._listener.counting(what)

    def training_began(self, step: int, steps: int) -> None:
        self._listener.training_began(step, steps)

    def step(self, step: int, steps: int) -> None:
        self._listener.step(step, steps)

    def metrics(self, row: dict[str, Any]) -> None:
        self._listener.metrics(row)

    def training_ended(self) -> None:
        self._listener.training_ended()

    def trying(self, rate: float, step: int, steps: int) -> None:
        self._listener.trying(rate, step, steps)

    def evaluating(self, name: str, done: int, total: int) -> None:
        self._listener.evaluating(name, done, total)
