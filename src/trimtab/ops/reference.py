"""The formulas, as one would write them on a board: slow, in full matrices, in the dtype of their arguments.

    V = W + dV    n = ||V||    W' = m V / n    y = x W'^T + bias

Every faster path is held against these, and they against formulas written once more in the tests. ``effective_weight``
is also what merging and converting compute with. Sources: LoRA 2106.09685 (4.1), rsLoRA 2312.03732, DoRA 2402.09353
(equation 5; the norm as a constant: 4.3), MoRA 2405.12130 (equations 6 and 9).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.decomposition import Axis, across, magnitude_over_norm


def effective_weight(
    weight: Tensor,
    delta: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    axis: Axis = "output",
    detach_norm: bool = False,
) -> Tensor:
    """``m (W + dV) / ||W + dV||``, or ``W + dV`` without a magnitude; differentiable in all its arguments.

    ``axis="output"``: one norm per row; ``"input"``: one per column. A row whose norm is 0 stays 0. Of a stack of
    weights ``[experts, out, in]``, each is taken by itself.
    """
    total = weight if delta is None else weight + delta
    if magnitude is None:
        return total
    norm = torch.linalg.vector_norm(total, dim=-1 if axis == "output" else -2)
    return total * across(magnitude_over_norm(magnitude, norm.detach() if detach_norm else norm), axis)


def low_rank_delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """LoRA: ``s B A``."""
    return scale * b @ a


def square_delta(matrix: Tensor, shape: tuple[int, int], *, turn: bool) -> Tensor:
    """MoRA. Sharing: ``dV[o, i] = M[o mod k, i mod k]``. Rotation: block b of the outputs has ``M R(j)`` in the columns
    of every chunk j of the inputs that feeds it, ``R(j)`` turning by the rotary angles of position j."""
    k, (out_features, in_features) = matrix.shape[0], shape
    blocks, chunks = math.ceil(out_features / k), math.ceil(in_features / k)
    groups = min(blocks, chunks) if turn else 1
    delta = matrix.new_zeros(blocks * k, chunks * k)
    for block in range(blocks):
        for chunk in range(chunks):
            if block % groups == chunk % groups:
                part = matrix @ rotation(k, chunk).to(matrix) if turn else matrix
                delta[block * k : (block + 1) * k, chunk * k : (chunk + 1) * k] = part
    return delta[:out_features, :in_features]


def rotation(side: int, position: int) -> Tensor:
    """``R(j)``: turns feature f against feature f + side / 2 by the angle ``j 10000^(-2 f / side)``."""
    half = torch.arange(side // 2)
    angle = position * 10000.0 ** (-2.0 * half.double() / side)
    turned = torch.zeros(side, side, dtype=torch.float64)
    turned[half, half] = turned[half + side // 2, half + side // 2] = angle.cos()
    turned[half, half + side // 2], turned[half + side // 2, half] = -angle.sin(), angle.sin()
    return turned


def output(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W'^T + bias``."""
    product = x @ weight.t()
    return product if bias is None else product + bias


class Gradients(NamedTuple):
    """Gradients of a loss with respect to the parts of ``y = x (m V / n)^T + bias``, given ``dy``."""

    x: Tensor
    bias: Tensor
    magnitude: Tensor | None
    total: Tensor
    """With respect to V, and so to dV."""


def gradients(
    grad: Tensor,
    x: Tensor,
    total: Tensor,
    *,
    magnitude: Tensor | None = None,
    axis: Axis = "output",
    detach_norm: bool = True,
) -> Gradients:
    """The gradients by their formulas, for ``grad = dy [tokens, out]``, ``x [tokens, in]`` and ``total = V [out, in]``.

    With ``G = dy^T x`` (the gradient of W') and ``c = m / n``:

        dx = dy W'    dbias = sum dy    dm = sum(G * V) / n    dV = c G            the norm a constant
                                                               dV = c (G - V sum(G * V) / n^2)    the exact gradient

    where the sums run along the rows (or columns) that a magnitude belongs to.
    """
    grad_weight = grad.t() @ x
    if magnitude is None:
        return Gradients(grad @ total, grad.sum(0), None, grad_weight)
    norm = torch.linalg.vector_norm(total, dim=1 if axis == "output" else 0)
    ratio = across(magnitude_over_norm(magnitude, norm), axis)
    along = (grad_weight * total).sum(1 if axis == "output" else 0)
    grad_total = ratio * grad_weight
    if not detach_norm:
        grad_total = grad_total - ratio * total * across(magnitude_over_norm(along, norm.square()), axis)
    return Gradients(grad @ (ratio * total), grad.sum(0), magnitude_over_norm(along, norm), grad_total)


def low_rank_gradients(grad_delta: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``dA = s B^T dV`` and ``dB = s dV A^T``, for the gradient of ``dV = s B A``."""
    return scale * b.t() @ grad_delta, scale * grad_delta @ a.t()


def square_gradient(grad_delta: Tensor, side: int, *, turn: bool) -> Tensor:
    """The gradient of M, for that of ``dV``: what each place of M went to, turned back and added up."""
    out_features, in_features = grad_delta.shape
    blocks, chunks = math.ceil(out_features / side), math.ceil(in_features / side)
    groups = min(blocks, chunks) if turn else 1
    padded = grad_delta.new_zeros(blocks * side, chunks * side)
    padded[:out_features, :in_features] = grad_delta
    total = grad_delta.new_zeros(side, side)
    for block in range(blocks):
        for chunk in range(chunks):
            if block % groups == chunk % groups:
                part = padded[block * side : (block + 1) * side, chunk * side : (chunk + 1) * side]
                total = total + (part @ rotation(side, chunk).to(part).t() if turn else part)
    return total
