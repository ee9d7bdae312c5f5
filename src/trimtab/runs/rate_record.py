"""``rate.json`` in a run folder: the trials of ``train.learning_rate: auto``, and the rate that it chose."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, ValidationError

from trimtab.errors import RunError
from trimtab.files import read_json
from trimtab.runs.records import Record


class RateTrial(Record):
    """One short training. ``loss`` is that at its end, in the unit of the task; None: it diverged."""

    round: int
    rate: float = Field(gt=0)
    steps: int = Field(gt=0)
    loss: float | None
    seconds: float

    @property
    def told(self) -> str:
        """The loss in words."""
        if self.loss is None:
            return "diverged"
        return f"{self.loss:.4f}" if 0.1 <= self.loss < 1e4 else f"{self.loss:.4g}"


class ChosenRate(Record):
    """What was tried, and what came of it.

    Attributes:
        rate: what the run trains with; None while trials are missing.
        likely: what the method, its size and the model let expect before anything was tried.
        run_steps: of the run that the rate is for.
        rows: validation rows that each trial was measured on; 0: by its own training loss.
        cost: of all trials with their measuring, in steps of the run.
        why: in a sentence, how the rate was chosen.
    """

    rate: float | None = Field(gt=0)
    likely: float
    run_steps: int
    rows: int
    cost: float
    trials: list[RateTrial]
    why: str = ""

    @property
    def last_round(self) -> list[RateTrial]:
        """The trials that decided, by rate."""
        last = max((trial.round for trial in self.trials), default=0)
        return sorted((trial for trial in self.trials if trial.round == last), key=lambda trial: trial.rate)

    @property
    def decided(self) -> bool:
        """Whether some trial of the last round did not diverge."""
        return any(trial.loss is not None for trial in self.last_round)

    @property
    def is_in_sight(self) -> bool:
        """Whether the rate lies among those of the last round, or not far from them: it is the run's, and theirs are
        those of shorter trainings."""
        tried = [trial.rate for trial in self.last_round]
        return self.rate is not None and bool(tried) and tried[0] / 2 < self.rate < 2 * tried[-1]


def read_rate(file: Path) -> ChosenRate | None:
    """What ``rate.json`` says; None where there is none. Raises RunError if it is damaged."""
    try:
        return ChosenRate.read(read_json(file))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError):
        raise RunError(f"{file}: a damaged file; remove it, and the trials are done again") from None
