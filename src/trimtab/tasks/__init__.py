"""The tasks: what a model is asked for. One file is one task, and the file's name is the task's name.

A task says which class of model it takes, how its rows are read and batched, what its loss is, by which metrics a step
can be chosen as the best, and what is trained beside the adapter (`_task.py`). Putting such a file into this folder is
all it takes.
"""

from __future__ import annotations

from trimtab import listing
from trimtab.errors import ConfigError, did_you_mean
from trimtab.models.causal_head import Head
from trimtab.tasks._inputs import Inputs, read_inputs
from trimtab.tasks._task import Task

__all__ = ["Head", "Inputs", "Task", "find", "names", "read_inputs"]


def names() -> list[str]:
    """The names of all tasks, sorted."""
    return listing.names(__path__)


def find(name: str) -> Task:
    """The task of that name. Raises ConfigError, which names the nearest, if there is none."""
    if name not in names():
        raise ConfigError(f"no task '{name}': expected one of {', '.join(names())}.{did_you_mean(name, names())}")
    return listing.class_in(__name__, name, Task)()  # type: ignore[type-abstract]
