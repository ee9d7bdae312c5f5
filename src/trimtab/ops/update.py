"""What an update ``dV [out, in]`` can do: multiply without being built, and be built where that is cheaper."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trimtab.ops.cost import Work
from trimtab.ops.kernels.contract import BackwardPass, Thin
from trimtab.ops.linear_map import LinearMap


class Update:
    """An update ``dV [out, in]``, linear in the last of its ``tensors``: the trained ones, in their own dtype.

    If it is thin, ``dV = s B A``, then ``thin`` gives the product with A and the kernels do the rest. Otherwise it
    defines ``add_product``.
    """

    is_thin: ClassVar[bool] = False

    def delta(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """``dV [out, in]`` in the dtype of ``tensors``, differentiable."""
        raise NotImplementedError

    def work(self, tokens: int, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Work:
        """What multiplying with the update costs on so many tokens."""
        raise NotImplementedError

    def fold(self, weight: Tensor, ratio: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        """``c (W + dV) [out, in]`` with ``ratio = c [out]``, None for 1: a new tensor in the dtype of ``weight``, and
        laid out as it is (a transposed weight stays one), so that multiplying with it is what the bare layer does."""
        raise NotImplementedError

    def thin(
        self,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        through: LinearMap,
        dtype: torch.dtype,
        *,
        inner: Tensor | None = None,
    ) -> Thin | None:
        """``x dV^T`` as a product of low rank, in ``dtype``; ``inner``: its first half, where that is there already.
        None for an update that is not thin."""
        return None

    def add_product(self, product: Tensor, rows: Tensor, tensors: tuple[Tensor, ...], through: LinearMap) -> None:
        """Add ``x dV^T`` to ``product [tokens, out]`` in place."""
        raise NotImplementedError

    def add_gradient(
        self,
        grad_rows: Tensor | None,
        after: BackwardPass,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        through: LinearMap,
    ) -> tuple[Tensor, ...]:
        """Add the gradient of the rows to ``grad_rows`` in place where it is wanted; return the gradients of
        ``tensors``. ``after`` is what the pass over the upstream gradient gave: for a thin update the gradients of its
        two factors, for another ``c dy``."""
        raise NotImplementedError


class BuiltUpdate(Update):
    """An update that reads features one by one, for a map whose batch has none (``LinearMap.reads_features``): dV is
    built, and goes through the map as a weight does."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self.delta, self.work, self.fold = update.delta, update.work, update.fold  # type: ignore[method-assign]

    def add_product(self, product: Tensor, rows: Tensor, tensors: tuple[Tensor, ...], through: LinearMap) -> None:
        product.add_(through.product(rows, self.delta(tensors).to(product.dtype)))

    def add_gradient(
        self,
        grad_rows: Tensor | None,
        after: BackwardPass,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        through: LinearMap,
    ) -> tuple[Tensor, ...]:
        leaves = tuple(tensor.detach().requires_grad_() for tensor in tensors)
        with torch.enable_grad():
            delta = self.delta(leaves)
        if grad_rows is not None:
            through.add_input_gradient(grad_rows, after.grad, delta.detach().to(after.grad.dtype))
        grad_delta = through.weight_gradient(after.grad, rows, delta.shape)
        return torch.autograd.grad(delta, leaves, grad_delta.to(delta.dtype))
