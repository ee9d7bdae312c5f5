"""Who is told that a model got adapters, or lost them. Folders above this one register here what they do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Watcher(NamedTuple):
    """What is called with a model after its adapters were put in, and after they were taken out."""

    attached: Callable[[nn.Module], None]
    removed: Callable[[nn.Module], None]


WATCHERS: list[Watcher] = []
