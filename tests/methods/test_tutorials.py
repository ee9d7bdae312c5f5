"""The DoRA and LoRA layers of the well-known tutorials, written plainly here, come out of our options.

The tutorials' DoRA takes its norm over dim 0 of ``[out, in]`` (``magnitude_axis: input``), trains through it
(``detach_norm: false``), draws ``A [in, rank]`` from a normal distribution (``init: gaussian`` with ``init_std``) and
multiplies by alpha alone (our alpha is theirs times the rank).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab

RANK, ALPHA = 4, 3.0
STANDARD_NORMAL, BY_ROOT_OF_RANK = 1.0, 1 / math.sqrt(RANK)


class TutorialLoRA(nn.Module):
    """``linear(x) + alpha * x A B``."""

    def __init__(self, linear: nn.Linear, std: float) -> None:
        super().__init__()
        self.linear = linear
        like = linear.weight
        self.A = nn.Parameter(torch.randn(linear.in_features, RANK, dtype=like.dtype) * std)
        self.B = nn.Parameter(torch.zeros(RANK, linear.out_features, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + ALPHA * (x @ self.A @ self.B)


class TutorialDoRA(TutorialLoRA):
    """``m * V / ||V||`` with ``V = W + alpha * (A B)^T`` and one norm for each column of ``V [out, in]``."""

    def __init__(self, linear: nn.Linear, std: float) -> None:
        super().__init__(linear, std)
        self.m = nn.Parameter(linear.weight.norm(p=2, dim=0, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        numerator = self.linear.weight + ALPHA * (self.A @ self.B).T
        direction = numerator / numerator.norm(p=2, dim=0, keepdim=True)
        return F.linear(x, self.m * direction, self.linear.bias)


TUTORIALS = {"lora": TutorialLoRA, "dora": TutorialDoRA}
LAYERS = ("0", "2", "4")


def mlp() -> nn.Sequential:
    """Three layers in float64: what differs after training is then rounding, or a mistake."""
    torch.manual_seed(1)
    layers = nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)
    return nn.Sequential(*layers).double()


def tutorial(method: str, std: float, seed: int) -> nn.Sequential:
    """The MLP with every layer replaced as the tutorials do it, and its own parameters frozen."""
    model = mlp().requires_grad_(False)
    torch.manual_seed(seed)
    for name in LAYERS:
        model._modules[name] = TUTORIALS[method](model._modules[name], std)  # type: ignore[arg-type]
    return model


def options(method: str, std: float) -> dict[str, Any]:
    """Ours for the same layer."""
    said = {"method": method, "rank": RANK, "alpha": ALPHA * RANK, "init": "gaussian", "init_std": std}
    return said if method == "lora" else {**said, "magnitude_axis": "input", "detach_norm": False}


def ours(method: str, std: float, seed: int) -> nn.Sequential:
    model = mlp()
    torch.manual_seed(seed)
    trimtab.attach(model, trimtab.Rule(match="*", **options(method, std)))
    return model


def copy_values(source: nn.Sequential, target: nn.Sequential) -> None:
    """The tutorial's trained tensors into ours, whose matrices are the transposed ones."""
    with torch.no_grad():
        for name in LAYERS:
            theirs: Any = source.get_submodule(name)
            adapter: Any = target.get_submodule(name).adapter
            adapter.A.copy_(theirs.A.T)
            adapter.B.copy_(theirs.B.T)
            if adapter.magnitude is not None:
                adapter.magnitude.copy_(theirs.m[0])


def train(model: nn.Module, optimizer: str, steps: int = 12) -> list[float]:
    """Losses of some steps on fixed rows; only what is trainable is given to the optimiser."""
    kind, rate = {"sgd": (torch.optim.SGD, 0.02), "adam": (torch.optim.Adam, 0.01)}[optimizer]
    made = kind(trimtab.trainable_parameters(model).values(), lr=rate)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(30, 12, dtype=torch.float64, generator=generator)
    y = torch.randint(5, (30,), generator=generator)
    losses = []
    for _ in range(steps):
        made.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        made.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("std", [STANDARD_NORMAL, BY_ROOT_OF_RANK], ids=["standard normal", "by root of rank"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_gives_the_tutorials_numbers(method: str, std: float, optimizer: str) -> None:
    """Losses of all steps, and then outputs and weights. 1e-12: what float64's rounding (1e-16) grows to over twelve
    steps; Adam's division of a gradient by its own size is what makes it grow."""
    theirs, mine = tutorial(method, std, seed=3), ours(method, std, seed=4)
    copy_values(theirs, mine)
    tensors = ("A", "B", "magnitude") if method == "dora" else ("A", "B")
    trained = trimtab.trainable_parameters(mine)
    assert set(trained) == {f"{name}.adapter.{tensor}" for name in LAYERS for tensor in tensors}
    counts = [sum(p.numel() for p in trimtab.trainable_parameters(model).values()) for model in (theirs, mine)]
    assert counts[0] == counts[1]
    wanted, losses = train(theirs, optimizer), train(mine, optimizer)
    assert losses == pytest.approx(wanted, rel=1e-12)
    assert losses[-1] < losses[0] - 0.04
    x = torch.randn(9, 12, dtype=torch.float64)
    assert torch.allclose(mine(x), theirs(x), rtol=1e-12, atol=1e-12)
    for name in LAYERS:
        layer: Any = theirs.get_submodule(name)
        weight = layer.linear.weight + ALPHA * (layer.A @ layer.B).T
        if method == "dora":
            weight = layer.m * weight / weight.norm(dim=0, keepdim=True)
        assert torch.allclose(trimtab.effective_weight(mine, name), weight, rtol=1e-12, atol=1e-12)
    merged = copy.deepcopy(mine)
    trimtab.merge(merged)
    assert torch.allclose(merged(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std", [STANDARD_NORMAL, BY_ROOT_OF_RANK], ids=["standard normal", "by root of rank"])
def test_one_seed_draws_the_tutorials_numbers(std: float) -> None:
    """Bit for bit, layer after layer. A tutorial's ``A`` is ``[in, rank]`` and ours ``[rank, in]``, so the numbers fill
    it in another order; of ``randn(rank, in)`` it is the same matrix."""
    theirs, mine = tutorial("dora", std, seed=7), ours("dora", std, seed=7)
    for name in LAYERS:
        layer: Any = theirs.get_submodule(name)
        adapter: Any = mine.get_submodule(name).adapter
        assert torch.equal(adapter.A.flatten(), layer.A.flatten())
        assert torch.equal(adapter.B, layer.B.T)
        assert torch.allclose(adapter.magnitude, layer.m[0], rtol=1e-15, atol=0)
    torch.manual_seed(7)
    assert torch.equal(mine.get_submodule("0").adapter.A, std * torch.randn(RANK, 12, dtype=torch.float64))


def test_the_exact_gradient_is_what_the_tutorials_train_with() -> None:
    """With the norm held constant (our default, and the paper's) the same start ends elsewhere."""
    theirs, mine = tutorial("dora", STANDARD_NORMAL, seed=3), mlp()
    rule = {**options("dora", STANDARD_NORMAL), "detach_norm": True}
    trimtab.attach(mine, trimtab.Rule(match="*", **rule))
    copy_values(theirs, mine)
    assert abs(train(theirs, "sgd")[-1] - train(mine, "sgd")[-1]) > 1e-6
