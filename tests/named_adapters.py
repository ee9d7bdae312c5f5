"""What the tests of several adapters share: a model with every kind of module, adapters for it, and the models that
have one of them alone, with the same numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import trimtab
from adapted_models import change
from expert_models import OwnExperts
from trimtab.bases import find, quantise


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 20), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Every(nn.Module):
    """An embedding tied to the head, an attention that reads its weights, a convolution, experts, a quantised layer, a
    block, a norm."""

    def __init__(self, quantised: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.block = Block()
        self.router, self.experts = nn.Linear(16, 3), OwnExperts()
        self.narrow, self.wide = nn.Linear(16, 4), nn.Linear(4, 16)
        self.packed: nn.Module = nn.Linear(16, 16)
        if quantised:
            handle = find(self.packed)
            assert handle is not None
            self.packed = quantise(handle, quantised)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.convolution(x.mT).mT.tanh()
        x = self.block(x)
        rows = x.flatten(0, 1)
        x = x + self.wide(self.experts(self.narrow(rows), self.router(rows).softmax(-1)).view(*x.shape[:2], 4))
        logits: Tensor = self.head(self.norm(x + self.packed(x)))
        return logits


def rule(match: str | list[str], method: str, **options: object) -> trimtab.Rule:
    return trimtab.Rule(match=match, method=method, **options)


# Different methods, ranks and modules under each name; and different kinds of adapter on one module.
PLANS: dict[str, list[trimtab.Rule]] = {
    "legal": [rule("*", "lora", rank=2, bias=True), rule("experts.*", "lora", rank=2)],
    "v1.5 (fr)": [
        rule(["embedding", "head", "packed"], "lora", rank=3),
        rule(["attention", "convolution", "block.*", "experts.inner"], "dora", rank=1),
        rule("norm", "full"),
    ],
    "default": [
        rule(["block.up", "packed", "attention.in_proj_weight", "convolution"], "mora", rank=2, magnitude=True),
        rule(["embedding", "head", "wide"], "full"),
        rule("block", "serial", bottleneck=3, width=16),
    ],
    "whole": [
        rule(["block.down", "attention", "convolution"], "full"),
        rule(["embedding", "head"], "full", rows=[1, 5]),
    ],
}


def ids(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, 24, (rows, 6), generator=torch.Generator().manual_seed(seed))


def attached(model: nn.Module, name: str) -> nn.Module:
    """``model`` with the adapter ``name``, whose numbers are the same each time."""
    torch.manual_seed(len(name))
    trimtab.attach(model, PLANS[name], name=name)
    change(model)
    return model


def together_and_alone(base: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A model with all adapters, and for each name one that has it alone."""
    together = copy.deepcopy(base)
    for name in PLANS:
        attached(together, name)
    return together, {name: attached(copy.deepcopy(base), name) for name in PLANS}
