"""What the tests of other libraries' loops share: trained tensors that are not as at their start, and logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import trimtab

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """The logits in eval mode."""
    training = model.training
    with torch.no_grad():
        result: Tensor = model.eval()(ids).logits
    model.train(training)
    return result


def change(model: nn.Module) -> None:
    """Let every trained tensor differ from its start."""
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
