"""The low-rank update ``dV = s B A`` with ``A [rank, in]`` and ``B [out, rank]``, never built where that is not asked
for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.ops.autocast import cast
from trimtab.ops.cost import Work, passes_on
from trimtab.ops.decomposition import Axis
from trimtab.ops.kernels import kernels_for, plain
from trimtab.ops.kernels.contract import BackwardPass, Thin
from trimtab.ops.linear_map import LinearMap
from trimtab.ops.update import Update


@dataclass(frozen=True)
class LowRank(Update):
    """Multiplies with ``s B A``. Tensors: ``(A, B)``; of a stack of weights, with its axis in front."""

    scale: float
    is_thin: ClassVar[bool] = True

    def delta(self, tensors: tuple[Tensor, ...]) -> Tensor:
        a, b = tensors
        return self.scale * b.matmul(a)

    def delta_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a, b = tensors
        return self.scale * b.t().matmul(grad), self.scale * grad.matmul(a.t())

    def work(self, tokens: int, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Work:
        a, b = tensors
        rank, in_features, out_features = a.shape[0], a.shape[1], b.shape[0]
        passes = passes_on(a.device)
        thin = 1 + rank / passes.ranks[dtype.itemsize]
        # In half precision a weight is formed in float32 and rounded after that.
        fold = thin if dtype.itemsize >= 4 else passes.half_fold + rank / passes.half_ranks
        return Work(thin * tokens * out_features, thin * tokens * in_features, fold * out_features * in_features)

    def fold(self, weight: Tensor, ratio: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        kernels = kernels_for(weight) if weight.dim() == 2 else plain
        return kernels.fold(weight, ratio, *tensors, scale=self.scale)

    def thin(
        self,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        through: LinearMap,
        dtype: torch.dtype,
        *,
        inner: Tensor | None = None,
    ) -> Thin:
        a, b = tensors
        if inner is None:
            rows = cast(rows, dtype) if rows.is_floating_point() else rows
            inner = through.product(rows, cast(a, dtype))
        return Thin(inner, b, self.scale)

    def add_gradient(
        self,
        grad_rows: Tensor | None,
        after: BackwardPass,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        through: LinearMap,
    ) -> tuple[Tensor, ...]:
        a, _ = tensors
        assert after.inner is not None
        assert after.b is not None
        if grad_rows is not None:
            through.add_input_gradient(grad_rows, after.inner, cast(a, after.inner.dtype))
        grad_a = through.weight_gradient(after.inner, rows, a.shape)
        return cast(grad_a, a.dtype), after.b


def squared_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, *, scale: float, axis: Axis) -> Tensor:
    """``||W + s B A||^2`` per row ``[out]`` or column ``[in]``, without building the sum; of a stack of weights
    ``[experts, out, in]``, expert by expert.

    ``||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>`` row by row, with ``squares = ||W||^2`` computed once.
    Differentiable in ``a`` and ``b``. The products with ``W`` run in its dtype, everything else in the dtype of
    ``squares``; the sum is kept from going below zero, where rounding would take it if the update cancels a row.
    """
    if axis == "output":
        differentiated = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        kernels = plain if differentiated or weight.dim() > 2 else kernels_for(weight)
        return kernels.squared_norms(weight, squares, a, b, scale=scale)
    a_full, b_full = a.to(squares.dtype), b.to(squares.dtype)
    crossed = b.to(weight.dtype).mT.matmul(weight).to(squares.dtype)  # B^T W: [rank, in]
    add_product = torch.addmm if weight.dim() == 2 else torch.baddbmm
    inner = add_product(crossed, b_full.mT.matmul(b_full), a_full, beta=2 * scale, alpha=scale**2)
    return (squares + (a_full * inner).sum(-2)).clamp_min(0)
