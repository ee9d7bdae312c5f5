"""Compares two states of a model by their logits on the same random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS, LENGTH = 2, 32


@dataclass(frozen=True)
class Agreement:
    """How far two states of a model agree."""

    difference: float
    """``||after - before|| / ||before||`` of the logits."""
    same_choice: float
    """The share of ``tokens`` after which the likeliest next token is the same."""
    tokens: int

    def __str__(self) -> str:
        return (
            f"logits differ by {self.difference:.1e} of their norm, and the likeliest next token is the same after "
            f"{100 * self.same_choice:.0f} % of them"
        )


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """The logits ``[rows, length, vocabulary]`` of ``model`` in float32, on few random tokens that are always the same.

    They take 64 x vocabulary x 4 bytes.
    """
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (ROWS, length), generator=generator).to(model.device)
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits.float()


def agreement(before: Tensor, after: Tensor) -> Agreement:
    """Compare two results of ``probe``."""
    same = before.argmax(-1) == after.argmax(-1)
    return Agreement(float((after - before).norm() / before.norm()), float(same.float().mean()), same.numel())
