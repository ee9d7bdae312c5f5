"""The optimiser of a run, and the groups of trained tensors that have a learning rate of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.config.run import TrainConfig
from trimtab.methods import RateGroup
from trimtab.surgery.attach import trained_tensors


def parameter_groups(
    model: nn.Module, learning_rate: float, magnitude_learning_rate: float | None, b_ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The trained tensors in groups of one learning rate each; each method says which of its tensors is in which.

    Magnitudes have their own rate and, like biases, never decay. The second factor of a low-rank update has ``b_ratio``
    times the rate (LoRA+, arXiv 2402.12354). Tensors that count in units of their own have groups of their own, with so
    much higher a rate and no more decay for it. Empty groups are left out.
    """
    # In this order: the first group's rate is logged, and an optimiser's state on disk counts through the groups.
    rates: dict[RateGroup, tuple[float, float]] = {
        "weight": (learning_rate, weight_decay),
        "bias": (learning_rate, 0.0),
        "second factor": (learning_rate * b_ratio, weight_decay),
        "magnitude": (learning_rate if magnitude_learning_rate is None else magnitude_learning_rate, 0.0),
    }
    trained = trained_tensors(model).values()
    groups: dict[tuple[RateGroup, float], list[nn.Parameter]] = {
        (group, unit): [] for unit in (1.0, *sorted({one.unit for one in trained} - {1.0})) for group in rates
    }
    for one in trained:
        groups[one.group, one.unit].append(one.parameter)
    return [
        {"params": tensors, "lr": rates[group][0] * unit, "weight_decay": rates[group][1] / unit}
        for (group, unit), tensors in groups.items()
        if tensors
    ]


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of the tensors that ``model`` trains."""
    groups = parameter_groups(
        model, train.rate, train.magnitude_learning_rate, train.b_learning_rate_ratio, train.weight_decay
    )
    try:
        return torch.optim.AdamW(groups, fused=True)  # a step of all tensors in one kernel
    except RuntimeError:  # not on every kind of device: there by lists of tensors
        return torch.optim.AdamW(groups, foreach=True)
