"""Rows of like lengths together, few enough of them to fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOKENS = 8192
"""Tokens of a batch, padding included, however many rows the caller allows: long texts come in smaller batches."""


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches, the longest first, so that a lack of memory shows at once.

    Args:
        lengths: tokens of each row.
        batch_size: most rows of a batch. One that would be wider than ``TOKENS`` has fewer, but at least one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    while order:
        rows = max(1, min(batch_size, TOKENS // max(1, lengths[order[0]])))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def padded_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 ``[rows, longest]``, filled with token 0, which nothing reads."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64, device=device)


def padded_left(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 ids ``[rows, longest]`` and their mask (1 where there is a token), to generate from."""
    width = max(map(len, rows))
    ids = [[*[fill] * (width - len(row)), *row] for row in rows]
    mask = [[*[0] * (width - len(row)), *[1] * len(row)] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
