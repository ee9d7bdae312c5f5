"""Several changes of one weight as one: sums of low-rank updates with magnitudes, which are exact, and the sums that
leave some of the numbers out.

With ``c = m / ||W + B A||`` (1 without a magnitude) a DoRA adapter acts as ``W' = c (W + B A)``, so that

    W + sum_i w_i (W'_i - W) = c' (W + B' A')        c' = 1 + sum_i w_i (c_i - 1)
                                                     A' the A_i one below the other
                                                     B' the w_i c_i B_i / c' side by side

is a DoRA adapter with the magnitude ``m' = c' ||W + B' A'||``, whose rank is the sum of the ranks; where no adapter
has a magnitude it is plain LoRA. With magnitudes for the columns, those of A are scaled in place of the rows of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.decomposition import Axis, across, magnitude_over_norm

_LEAST_RATIO = 1e-6


class LowRankAdapter(NamedTuple):
    """``W' = m (W + B A) / ||W + B A||``, or ``W + B A`` without a magnitude; in float64, with the scale in B."""

    a: Tensor
    """``[..., rank, in]``"""
    b: Tensor
    """``[..., out, rank]``"""
    magnitude: Tensor | None

    def ratio(self, weight: Tensor, axis: Axis) -> Tensor | None:
        """``c``, for each row or column of ``weight``."""
        if self.magnitude is None:
            return None
        norm = torch.linalg.vector_norm(weight + self.b @ self.a, dim=-1 if axis == "output" else -2)
        return magnitude_over_norm(self.magnitude, norm)


def weighted_sum(
    weight: Tensor, adapters: Sequence[tuple[float, LowRankAdapter]], axis: Axis = "output"
) -> LowRankAdapter:
    """The adapter that acts as ``W + sum_i w_i (W'_i - W)``. Exact, but where c' is all but zero: such a row (or
    column) keeps a share of ``1e-6`` of W, unless nothing is added to it."""
    ratios = [adapter.ratio(weight, axis) for _, adapter in adapters]
    if all(ratio is None for ratio in ratios):
        b = torch.cat([share * adapter.b for share, adapter in adapters], -1)
        return LowRankAdapter(torch.cat([adapter.a for _, adapter in adapters], -2), b, None)
    total = torch.ones_like(next(ratio for ratio in ratios if ratio is not None))
    for (share, _), ratio in zip(adapters, ratios, strict=True):
        total = total if ratio is None else total + share * (ratio - 1)
    divisor = torch.where(total.abs() < _LEAST_RATIO, torch.where(total < 0, -_LEAST_RATIO, _LEAST_RATIO), total)
    parts_a, parts_b = [], []
    for (share, adapter), ratio in zip(adapters, ratios, strict=True):
        scale = across((torch.ones_like(total) if ratio is None else ratio) / divisor, axis)
        parts_a.append(adapter.a if axis == "output" else adapter.a * scale)
        parts_b.append(share * adapter.b * scale if axis == "output" else share * adapter.b)
    a, b = torch.cat(parts_a, -2), torch.cat(parts_b, -1)
    update = b @ a
    adds_nothing = (update == 0).all(-1 if axis == "output" else -2)
    norm = torch.linalg.vector_norm(weight + update, dim=-1 if axis == "output" else -2)
    return LowRankAdapter(a, b, torch.where(adds_nothing, total, divisor) * norm)


def largest(delta: Tensor, density: float) -> Tensor:
    """``delta`` with no more than its largest numbers, a share of ``density`` of them; zero elsewhere."""
    count = int(density * delta.numel())
    kept = torch.zeros_like(delta).flatten()
    places = delta.abs().flatten().topk(count).indices
    kept[places] = delta.flatten()[places]
    return kept.view_as(delta)


def drawn(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2023, arXiv 2311.03099): each number is kept with the chance ``density`` and then divided by it,
    else zero."""
    kept = torch.rand(delta.shape, dtype=delta.dtype, generator=generator) < density
    return torch.where(kept.to(delta.device), delta / density, torch.zeros_like(delta))


def elected(deltas: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv 2306.01708, section 3), after the trimming: of each number the sign with the
    larger sum is elected, and the mean is taken of ``share * delta`` over the changes that have this sign.

    As in PEFT, whose ``add_weighted_adapter`` calls it ``ties``, shares do not vote.
    """
    votes = torch.stack(list(deltas)).sum(0)
    sign = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for share, delta in zip(shares, deltas, strict=True):
        agrees = delta.sign() == sign
        total += torch.where(agrees, share * delta, 0.0)
        count += agrees
    return total / count.clamp_min(1)
