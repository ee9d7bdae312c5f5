"""Full fine-tuning as a method: a copy in full digits, the base untouched until the merge."""

from __future__ import annotations

import torch
from torch import nn

import trimtab


def test_small_steps_on_a_bfloat16_base_add_up() -> None:
    """A thousand steps of a thousandth of a unit: bfloat16 would lose each one of them."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False).bfloat16())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    trimtab.attach(model, trimtab.Rule(match="0", method="full"))
    weight = model[0].adapter.weight
    assert weight.dtype == torch.float32
    step = 2.0**-7 / 1000
    optimiser = torch.optim.SGD([weight], lr=step)
    for _ in range(1000):
        weight.grad = -torch.ones_like(weight)
        optimiser.step()
    assert torch.equal(model[0].base.weight, torch.ones(3, 4, dtype=torch.bfloat16)), "the base stays as it was"
    trimtab.merge(model)
    assert torch.equal(model[0].weight, torch.full((3, 4), 1 + 2.0**-7, dtype=torch.bfloat16))


def test_it_counts_all_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    report = trimtab.attach(model, trimtab.Rule(match="0", method="full", magnitude=True))
    assert report.trainable_parameters == 12 + 3
    assert report.total_parameters == 12 + 3  # the bare model: the bias in place of the magnitudes
    trimtab.detach(model)
    assert model[0].weight.requires_grad
