"""The low-rank update ``dV = s B A`` with ``A [rank, in]`` and ``B [out, rank]``, never built where that is not asked
for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.cost import FEW, RANKS_PER_PASS, Work
from trimtab.ops.decomposition import Axis, row_blocks

_BLOCK = 1 << 18  # elements: what a processor's second cache holds in float32


@dataclass(frozen=True)
class LowRank:
    """Multiplies with ``s B A``. Tensors: ``(A, B)``."""

    scale: float
    takes_ratio: ClassVar[bool] = True  # it goes into B

    def work(self, tokens: int, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Work:
        """What multiplying with the update costs."""
        a, b = tensors
        rank, in_features, out_features = a.shape[0], a.shape[1], b.shape[0]
        thin = 1 + rank / RANKS_PER_PASS[dtype.itemsize]
        # In half precision a weight is formed in float32 and rounded after that.
        fold = thin if dtype.itemsize >= 4 else 1.7 + rank / RANKS_PER_PASS[4]
        return Work(thin * tokens * out_features, thin * tokens * in_features, fold * out_features * in_features)

    def fold(self, weight: Tensor, ratio: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        """``c (W + s B A)``, a new tensor ``[out, in]`` laid out as ``weight`` is, rounded once."""
        a, b = tensors
        work = torch.promote_types(weight.dtype, torch.float32)
        a, b, rows = a.to(work), b.to(work) * self.scale, None if ratio is None else ratio.to(work).unsqueeze(1)
        if weight.dtype == work:
            total = weight.clone().addmm_(b, a)
            return total if rows is None else total.mul_(rows)
        total = torch.empty_like(weight)
        for block in row_blocks(weight.shape[0], weight.shape[1], _BLOCK):  # the full digits of a few rows at a time
            full = weight[block].to(work).addmm_(b[block], a)
            total[block] = full if rows is None else full.mul_(rows[block])
        return total

    def add_product(self, product: Tensor, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if x.shape[0] <= FEW[x.dtype.itemsize]:
            a, b = tensors
            update = F.linear(F.linear(x.float(), a.float()), b.float())
            product.copy_(product.float().add_(update, alpha=self.scale))  # quicker than adding two dtypes
            return ()
        a, b = tensors[0].to(x.dtype), (tensors[1] * self.scale).to(x.dtype)
        inner = x.mm(a.t())
        product.addmm_(inner, b.t())
        return inner, a, b

    def add_gradient(
        self,
        grad_x: Tensor | None,
        grad: Tensor,
        ratio: Tensor | None,
        x: Tensor,
        kept: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        inner, a, b = kept or (None, tensors[0].to(grad.dtype), None)
        factor = tensors[1].new_full((1, 1), self.scale) if ratio is None else (self.scale * ratio).unsqueeze(1)
        if b is None or ratio is not None:
            b = (tensors[1] * factor).to(grad.dtype)
        if inner is None:
            inner = x.mm(a.t())
        grad_inner = grad.mm(b)
        if grad_x is not None:
            grad_x.addmm_(grad_inner, a)
        # Transposed, the second is up to twice as fast.
        return grad_inner.t().mm(x).to(tensors[0].dtype), (inner.t().mm(grad).t() * factor).to(tensors[1].dtype)


def squared_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float, axis: Axis) -> Tensor:
    """``||W + s B A||^2`` per row ``[out]`` or column ``[in]``, without building the sum.

    ``||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>`` row by row, with ``squares = ||W||^2`` computed once.
    Differentiable in ``a`` and ``b``. The products with ``W`` run in its dtype, everything else in the dtype of
    ``squares``; the sum is kept from going below zero, where rounding would take it if the update cancels a row.
    """
    a_full, b_full = a.to(squares.dtype), b.to(squares.dtype)
    if axis == "output":
        crossed = F.linear(weight, a.to(weight.dtype)).to(squares.dtype)  # W A^T: [out, rank]
        inner = torch.addmm(crossed, b_full, a_full.matmul(a_full.t()), beta=2 * scale, alpha=scale**2)
        return (squares + (b_full * inner).sum(1)).clamp_min(0)
    crossed = b.to(weight.dtype).t().matmul(weight).to(squares.dtype)  # B^T W: [rank, in]
    inner = torch.addmm(crossed, b_full.t().matmul(b_full), a_full, beta=2 * scale, alpha=scale**2)
    return (squares + (a_full * inner).sum(0)).clamp_min(0)
