"""A training step of convolutions and look-ups with adapters: ours, PEFT's, and the bare layers.

    python benchmarks/kinds.py                                   all works, rank 8, float32
    python benchmarks/kinds.py --works resnet --dtype bfloat16   some of it

A step is the output, the gradient of the input (where it has one) and those of what is trained. The arms take turns in
one process. PEFT has no adapter for a depthwise convolution whose channels do not divide the rank.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import alternate, show_over, write_results
from step import with_peft

ARMS = ("bare", "lora", "dora", "peft lora", "peft dora")


class Residual(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Depthwise(nn.Module):
    """The convolution of a ConvNeXt block, which has as many groups as channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.deep = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.deep(x)
        return y


WORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "patches": (lambda: nn.Sequential(nn.Conv2d(3, 192, 16, stride=16)), lambda: torch.randn(8, 3, 224, 224)),
    "resnet": (lambda: nn.Sequential(Residual(64)), lambda: torch.randn(4, 64, 28, 28)),
    "resnet-deep": (lambda: nn.Sequential(Residual(256)), lambda: torch.randn(4, 256, 14, 14)),
    "convnext": (lambda: nn.Sequential(Depthwise(96)), lambda: torch.randn(4, 96, 28, 28)),
    "speech": (lambda: nn.Sequential(nn.Conv1d(256, 256, 3, padding=1)), lambda: torch.randn(4, 256, 500)),
    "video": (
        lambda: nn.Sequential(nn.Conv3d(3, 192, (2, 16, 16), stride=(2, 16, 16))),
        lambda: torch.randn(1, 3, 8, 224, 224),
    ),
    "words": (lambda: nn.Sequential(nn.Embedding(32000, 576)), lambda: torch.randint(32000, (4, 512))),
}


def adapted(arm: str, model: nn.Module, rank: int, dtype: torch.dtype) -> nn.Module | None:
    """``model`` as ``arm`` adapts it; None if it cannot."""
    import trimtab

    targets = [
        name for name, module in model.named_modules() if isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding))
    ]
    if arm.startswith("peft"):
        try:
            model = with_peft(model, arm, rank, targets, dtype)
        except ValueError:
            return None
    elif arm != "bare":
        trimtab.attach(model, trimtab.Rule(match=targets, method=arm, rank=rank, alpha=2 * rank))
    else:
        model.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    return model


def step(model: nn.Module, x: Tensor) -> None:
    y = model(x)
    if y.requires_grad:
        y.backward(torch.ones_like(y))
    for parameter in model.parameters():
        parameter.grad = None
    x.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20)
    said = parser.parse_args()
    warnings.simplefilter("ignore")
    dtype = getattr(torch, said.dtype)
    seconds: dict[str, dict[str, list[float]]] = {}
    for work in said.works:
        make, draw = WORKS[work]
        x: Any = draw()
        x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
        steps = {}
        for arm in ARMS:
            torch.manual_seed(0)
            if (model := adapted(arm, make().to(dtype), said.rank, dtype)) is not None:
                steps[arm] = partial(step, model, x)
        seconds[work] = alternate(steps, said.repeats)
    found: dict[str, Any] = {}
    for work, times in seconds.items():
        found |= show_over(f"{work}: a step at rank {said.rank}, {said.dtype}", {work: times}, "bare")
    write_results("kinds", vars(said), found)


if __name__ == "__main__":
    main()
