"""PEFT's low-rank update of a convolution with groups: its A reads the channels of all groups, and only B has groups.

    dV = s B A        A [rank, channels * kernel], B [out, rank / groups]

Output channel o of group j takes the numbers of ranks ``j rank / groups`` and following. No kernel of the layer's own
shape ``[out, channels / groups * kernel]`` gives the same, so this update is always multiplied with, and never merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.ops.autocast import cast, scaled_to
from trimtab.ops.cost import Work
from trimtab.ops.kernels.contract import BackwardPass
from trimtab.ops.linear_map import LinearMap
from trimtab.ops.update import Update


@dataclass(frozen=True)
class AcrossGroups(Update):
    """Multiplies with ``s B A``. Tensors: ``(A, B)``."""

    scale: float
    groups: int
    takes_any_map: ClassVar[bool] = True

    def work(self, tokens: int, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Work:
        return Work(0.0, 0.0, math.inf)

    def _grouped(self, tensor: Tensor) -> Tensor:
        """``[batch, features, places]`` cut by groups: ``[batch, groups, features / groups, places]``."""
        cut: Tensor = tensor.unflatten(1, (self.groups, -1))
        return cut

    def _b(self, b: Tensor, dtype: torch.dtype) -> Tensor:
        """``s B [groups, out / groups, rank / groups]``."""
        cut: Tensor = scaled_to(b, self.scale, dtype).unflatten(0, (self.groups, -1))
        return cut

    def add_product(self, product: Tensor, rows: Tensor, tensors: tuple[Tensor, ...], through: LinearMap) -> None:
        a, b = tensors
        inner = through.ungrouped.product(rows, cast(a, product.dtype))
        product.add_(self._b(b, product.dtype).matmul(self._grouped(inner)).flatten(1, 2))

    def add_gradient(
        self,
        grad_rows: Tensor | None,
        after: BackwardPass,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        through: LinearMap,
    ) -> tuple[Tensor, ...]:
        a, b = tensors
        dense, grad = through.ungrouped, self._grouped(after.grad)
        inner = self._grouped(dense.product(rows, cast(a, rows.dtype)))
        grad_b = grad.matmul(inner.transpose(2, 3)).sum(0).flatten(0, 1) * self.scale
        grad_inner = self._b(b, grad.dtype).transpose(1, 2).matmul(grad).flatten(1, 2)
        if grad_rows is not None:
            dense.add_input_gradient(grad_rows, grad_inner, cast(a, grad_inner.dtype))
        return cast(dense.weight_gradient(grad_inner, rows, a.shape), a.dtype), cast(grad_b, b.dtype)


def squared_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The squares of PEFT's norms ``[out]``, by which its DoRA divides: B and A are multiplied as if there were no
    groups, ``[out / groups, rank]`` times ``[rank, groups * in]``, and the product is cut into rows anew."""
    work = squares.dtype  # of which no more is needed: this sum has no cheaper form
    update = b.to(work).reshape(-1, a.shape[0]).matmul(a.to(work)).reshape(weight.shape)
    return (weight.to(work) + scale * update).square().sum(1)
