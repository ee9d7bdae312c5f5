"""A plain three-layer MLP, pretrained on small pictures of digits, adapted to the same digits lying on their side.

    python examples/mlp.py          # a few seconds; the pictures come with scikit-learn

LoRA and DoRA train a few numbers beside the frozen weights; full fine-tuning, on as many rows and steps, is the
yardstick. One seed: the table shows that the methods work, not which is best.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import trimtab

PRETRAIN_STEPS, ADAPT_STEPS, ADAPT_ROWS = 400, 300, 300
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora", "rank": 4},
    "DoRA": {"method": "dora", "rank": 4},
    # As tutorials write DoRA: the norm over dim 0, standard-normal A, scale 1, the gradient through the norm.
    "DoRA of the tutorials": {
        "method": "dora",
        "rank": 4,
        "alpha": 4,
        "magnitude_axis": "input",
        "init": "gaussian",
        "init_std": 1,
        "detach_norm": False,
    },
    "full": {"method": "full"},
}


def pictures() -> tuple[Tensor, Tensor]:
    """1,797 pictures ``[rows, 8, 8]`` with values from 0 to 1, shuffled, and their digits."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return torch.tensor(found.images[order] / 16, dtype=torch.float32), torch.tensor(found.target[order])


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, learning_rate: float) -> None:
    """AdamW on batches of 64 rows, over whatever parameters are trainable."""
    optimizer = torch.optim.AdamW(trimtab.trainable_parameters(model).values(), lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> str:
    return f"{100 * (model(x).argmax(1) == y).float().mean():.1f} %"


def main() -> None:
    torch.manual_seed(0)
    upright, digit = pictures()
    turned = upright.rot90(1, (1, 2))
    learned, unseen, tested = slice(0, 600), slice(600, 600 + ADAPT_ROWS), slice(1200, None)

    base = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    train(base, upright[learned], digit[learned], PRETRAIN_STEPS, 1e-3)

    right = accuracy(base, upright[tested], digit[tested])
    print(f"pretrained on {len(digit[learned])} upright pictures: {right} of others right")
    print(f"on {len(digit[tested])} turned ones, before and after {ADAPT_STEPS} steps on {ADAPT_ROWS} others:\n")
    table = Table(box=None, pad_edge=False)
    for name in ("method", "trained", "of all", "before", "after", "merge error"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, options in ARMS.items():
        model = copy.deepcopy(base)
        report = trimtab.attach(model, trimtab.Rule(match="*", **options))
        train(model, turned[unseen], digit[unseen], ADAPT_STEPS, 1e-3 if name == "full" else 1e-2)

        # Only what was meant to be trained has moved: taken off again, the base is what it was, bit for bit.
        bare = copy.deepcopy(model)
        trimtab.detach(bare)
        assert all(torch.equal(value, base.state_dict()[key]) for key, value in bare.state_dict().items())

        with torch.no_grad():
            adapted = model(turned[tested])
        after = accuracy(model, turned[tested], digit[tested])
        trimtab.merge(model)  # a plain MLP again, and as fast as the first
        with torch.no_grad():
            error = ((model(turned[tested]) - adapted).abs().max() / adapted.abs().max()).item()
        counts = report.counts
        table.add_row(
            name,
            f"{counts['trainable']:,}",
            f"{100 * counts['trainable'] / counts['total']:.0f} %",
            accuracy(base, turned[tested], digit[tested]),
            after,
            f"{error:.0e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
