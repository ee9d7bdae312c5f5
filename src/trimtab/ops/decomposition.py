"""A weight as magnitude and direction, and how far two weights lie apart in each (DoRA, arXiv 2402.09353, section 3.2).

A weight has the shape ``[out, in]``. ``axis="output"`` gives one magnitude per output row (the norm runs over the
inputs, as in the authors' code and in every checkpoint in the wild); ``axis="input"`` one per input column.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Axis = Literal["output", "input"]

# Rows are reduced in blocks of about this many elements, so that no float64 copy of a whole weight ever exists.
_BLOCK_ELEMENTS = 1 << 22


class WeightChange(NamedTuple):
    """How far a weight moved: the paper's dM and dD, averaged over its magnitudes."""

    delta_magnitude: float
    delta_direction: float


def row_blocks(rows: int, columns: int, elements: int | None = None) -> list[slice]:
    """Slices that cut ``rows`` rows of ``columns`` elements into blocks of at most about ``elements`` elements."""
    step = max(1, (elements or _BLOCK_ELEMENTS) // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def squared_norms(weight: Tensor, axis: Axis = "output") -> Tensor:
    """Squared norm of every row (``[out]``) or column (``[in]``) of ``weight [out, in]``, summed in float64; of each
    weight of a stack ``[experts, out, in]``, in the order of the stack."""
    if weight.dim() > 2:
        return torch.stack([squared_norms(one, axis) for one in weight])
    return _dots(weight, weight, axis)


def _dots(one: Tensor, other: Tensor, axis: Axis) -> Tensor:
    """The product of every row (or column) of ``one`` with that of ``other``, summed in float64 over a block at a time.

    Norms and products are summed alike, so that a row that did not change has a cosine of exactly 1.
    """
    sums = []
    for block in row_blocks(*one.shape):
        left = one[block].double()
        right = left if other is one else other[block].double()
        sums.append((left * right).sum(1 if axis == "output" else 0))
    return torch.cat(sums) if axis == "output" else torch.stack(sums).sum(0)


def across(vector: Tensor, axis: Axis) -> Tensor:
    """``vector`` shaped to multiply a ``[out, in]`` weight row by row or column by column."""
    return vector.unsqueeze(-1) if axis == "output" else vector.unsqueeze(-2)


def magnitude_over_norm(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``m / n``, and 0 where the norm is 0: such a row gives 0, and no gradient reaches its magnitude."""
    alive = norm > 0
    return torch.where(alive, magnitude / torch.where(alive, norm, torch.ones_like(norm)), torch.zeros_like(norm))


def decompose(weight: Tensor, axis: Axis = "output") -> tuple[Tensor, Tensor]:
    """Split ``weight [out, in]`` into its magnitude (``[out]``, or ``[in]`` for ``axis="input"``) and its direction
    ``[out, in]``.

    ``magnitude * direction`` along the axis gives the weight back. A row of zeros has magnitude 0 and direction 0.
    Source: DoRA (arXiv 2402.09353), equation 2. Raises ``ValueError`` if the weight has not two dimensions.
    """
    if weight.dim() != 2:
        raise ValueError(f"decompose: expected a weight of shape [out, in], got {list(weight.shape)}")
    work = weight if weight.dtype == torch.float64 else weight.float()
    magnitude = squared_norms(weight, axis).sqrt().to(work.dtype)
    return magnitude, work * across(magnitude_over_norm(torch.ones_like(magnitude), magnitude), axis)


def row_changes(before: Tensor, after: Tensor, axis: Axis = "output") -> tuple[Tensor, Tensor]:
    """``|m_t - m_0|`` and ``1 - cos(V_t, W_0)`` of every row (or column), in float64: what ``weight_change`` is the
    mean of."""
    if before.shape != after.shape or before.dim() != 2:
        raise ValueError(
            f"weight_change: expected two weights of one shape [out, in], got {list(before.shape)} and "
            f"{list(after.shape)}"
        )
    square_before, square_after = squared_norms(before, axis), squared_norms(after, axis)
    dot = _dots(before, after, axis)
    length = (square_before * square_after).sqrt()
    cosine = torch.where(length > 0, dot / length.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(dot))
    still = (square_before == 0) & (square_after == 0)
    direction = torch.where(still, torch.zeros_like(cosine), 1 - cosine.clamp(-1, 1))
    return (square_after.sqrt() - square_before.sqrt()).abs(), direction


def weight_change(before: Tensor, after: Tensor, axis: Axis = "output") -> WeightChange:
    """``dM = mean |m_t - m_0|`` and ``dD = mean (1 - cos(V_t, W_0))`` over the rows (DoRA, section 3.2), in float64.

    ``before`` and ``after`` are weights of one shape ``[out, in]``. A row that is zero in both has not changed; a row
    that is zero in only one of them counts as turned by a right angle (cosine 0). Raises ``ValueError`` if the shapes
    differ.
    """
    magnitude, direction = row_changes(before, after, axis)
    return WeightChange(magnitude.mean().item(), direction.mean().item())
