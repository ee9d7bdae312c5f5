"""How many steps a run has."""

from __future__ import annotations

import math

from trimtab.config.run import TrainConfig


def epoch_steps(train: TrainConfig, rows: int) -> int:
    """Optimiser steps of one epoch."""
    return math.ceil(math.ceil(rows / train.batch_size) / train.gradient_accumulation)


def total_steps(train: TrainConfig, rows: int) -> int:
    """Optimiser steps of the whole run."""
    whole = math.ceil(train.epochs * epoch_steps(train, rows))
    return max(1, whole if train.max_steps is None else min(whole, train.max_steps))
