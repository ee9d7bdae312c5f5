"""Norms while trained tensors are held: computed once a step, and never used after one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab
from trimtab.ops import low_rank
from trimtab.training.steady import Steady


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a norm is computed."""
    counted: list[int] = []
    real = low_rank.squared_norms

    def count(*args: object, **kwargs: object) -> object:
        counted.append(1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(low_rank, "squared_norms", count)
    return counted


def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    trimtab.attach(layers, trimtab.Plan(rules=[trimtab.Rule(match="*", method="dora", rank=2)]))
    return layers


def test_norms_are_computed_once_for_the_small_batches_of_a_step(computed: list[int]) -> None:
    layers, x = model(), torch.randn(3, 6)
    optimiser = torch.optim.AdamW(layers.parameters(), 0.1, foreach=True)
    steady, losses, plain = Steady(layers), [], []
    for _ in range(2):
        for is_last in (False, False, True):
            with torch.inference_mode():  # as a look at the model between passes; what it keeps is no good for training
                layers(x)
            with steady.small_batch(is_last=is_last):
                loss = layers(x).square().sum()
                loss.backward()
            losses.append(loss.item())
            plain.append(layers(x).square().sum().item())
        optimiser.step()
        optimiser.zero_grad()
    assert losses == plain
    assert losses[3] != losses[0]


def test_a_held_model_computes_two_norms_a_step(computed: list[int]) -> None:
    layers, x = model(), torch.randn(3, 6)
    steady = Steady(layers)
    for is_last in (False, False, True):
        with steady.small_batch(is_last=is_last):
            layers(x).sum().backward()
    assert len(computed) == 2
    layers(x)
    layers(x)
    assert len(computed) == 6


def test_a_step_that_fails_lets_go(computed: list[int]) -> None:
    layers, x = model(), torch.randn(3, 6)
    steady = Steady(layers)

    def interrupted() -> None:
        with steady.small_batch(is_last=False):
            layers(x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    before = layers(x)
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(layers).values():
            parameter.data.add_(1.0)
    assert not torch.equal(layers(x), before)
    layers(x)
    assert len(computed) == 8
