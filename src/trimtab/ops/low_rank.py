"""The low-rank update ``dV = s B A`` with ``A [rank, in]`` and ``B [out, rank]``, never built where that is not asked
for."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.decomposition import Axis


@dataclass(frozen=True)
class LowRank:
    """Multiplies with ``s B A`` in factored form. Tensors: ``(A, B)``."""

    scale: float

    def add_product(self, product: Tensor, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a, b = tensors
        inner = x.matmul(a.to(x.dtype).t())
        product.addmm_(inner, (b * self.scale).to(x.dtype).t())
        return (inner,)

    def add_gradient(
        self, grad_x: Tensor | None, grad: Tensor, x: Tensor, kept: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        a, b = tensors
        (inner,) = kept
        grad_inner = grad.matmul((b * self.scale).to(grad.dtype))
        if grad_x is not None:
            grad_x.addmm_(grad_inner, a.to(grad.dtype))
        grad_a = grad_inner.t().matmul(x).to(a.dtype)
        grad_b = grad.t().matmul(inner).to(b.dtype) * self.scale
        return grad_a, grad_b


def squared_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float, axis: Axis) -> Tensor:
    """``||W + s B A||^2`` per row ``[out]`` or column ``[in]``, without building the sum.

    ``||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>`` row by row, with ``squares = ||W||^2`` computed once.
    Differentiable in ``a`` and ``b``. The products with ``W`` run in its dtype, everything else in the dtype of
    ``squares``; the sum is kept from going below zero, where rounding would take it if the update cancels a row.
    """
    a_full, b_full = a.to(squares.dtype), b.to(squares.dtype)
    if axis == "output":
        crossed = F.linear(weight, a.to(weight.dtype)).to(squares.dtype)  # W A^T: [out, rank]
        inner = 2 * scale * crossed + scale**2 * b_full.matmul(a_full.matmul(a_full.t()))
        return (squares + (b_full * inner).sum(1)).clamp_min(0)
    crossed = b.to(weight.dtype).t().matmul(weight).to(squares.dtype)  # B^T W: [rank, in]
    inner = 2 * scale * crossed + scale**2 * b_full.t().matmul(b_full).matmul(a_full)
    return (squares + (a_full * inner).sum(0)).clamp_min(0)
