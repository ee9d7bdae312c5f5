"""What an update ``dV [out, in]`` can do: multiply without being built, and be built where that is cheaper."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trimtab.ops.autocast import at_least, cast
from trimtab.ops.cost import Work
from trimtab.ops.kernels.contract import BackwardPass, Thin
from trimtab.ops.linear_map import LinearMap


class Update:
    """An update ``dV [out, in]``, linear in the last of its ``tensors``: the trained ones, in their own dtype.

    If it is thin, ``dV = s B A``, then ``thin`` gives the product with A and the kernels do the rest. Otherwise it
    defines ``add_product``.
    """

    is_thin: ClassVar[bool] = False
    only_built: ClassVar[bool] = False
    """Whether it multiplies with no map but as the weight that is built of it."""
    takes_any_map: ClassVar[bool] = False
    """Whether it multiplies by itself with whatever map, and is never built."""

    def delta(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """``dV [out, in]`` in the dtype of ``tensors``, differentiable."""
        raise NotImplementedError

    def delta_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of ``tensors`` for ``grad [out, in]``, that of dV."""
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

    def before_spread(self, rows: Tensor, tensors: tuple[Tensor, ...], through: LinearMap) -> Tensor | None:
        """``[tokens, side]``, of which ``x dV^T`` is repeated until a row is full; None where it is added otherwise
        (``add_product``)."""
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
        self.delta, self.delta_gradient = update.delta, update.delta_gradient  # type: ignore[method-assign]
        self.work, self.fold = update.work, update.fold  # type: ignore[method-assign]

    def add_product(self, product: Tensor, rows: Tensor, tensors: tuple[Tensor, ...], through: LinearMap) -> None:
        delta = self.delta(tuple(at_least(tensor, product.dtype) for tensor in tensors))
        product.add_(through.product(rows, delta.to(product.dtype)))

    def add_gradient(
        self,
        grad_rows: Tensor | None,
        after: BackwardPass,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        through: LinearMap,
    ) -> tuple[Tensor, ...]:
        full = tuple(at_least(tensor, after.grad.dtype) for tensor in tensors)
        delta = self.delta(full)
        if grad_rows is not None:
            through.add_input_gradient(grad_rows, after.grad, delta.to(after.grad.dtype))
        grad_delta = through.weight_gradient(after.grad, rows, delta.shape)
        grads = self.delta_gradient(grad_delta.to(delta.dtype), full)
        return tuple(cast(grad, tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True))


class WithoutColumn(Update):
    """An update whose ``column`` is kept at zero, whatever the others are."""

    only_built: ClassVar[bool] = True

    def __init__(self, update: Update, column: int) -> None:
        self._update, self._column = update, column
        self.work = update.work  # type: ignore[method-assign]

    def delta(self, tensors: tuple[Tensor, ...]) -> Tensor:
        delta = self._update.delta(tensors)
        return delta.index_fill(1, torch.tensor([self._column], device=delta.device), 0)

    def delta_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held = torch.tensor([self._column], device=grad.device)
        return self._update.delta_gradient(grad.index_fill(1, held, 0), tensors)

    def fold(self, weight: Tensor, ratio: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        total = self._update.fold(weight, ratio, tensors)
        kept = weight[:, self._column]
        total[:, self._column] = kept if ratio is None else (kept * ratio).to(weight.dtype)
        return total


class TurnedUpdate(Update):
    """The transpose of an update: ``dV^T [in, out]``."""

    only_built: ClassVar[bool] = True

    def __init__(self, update: Update) -> None:
        self._update = update

    def delta(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return self._update.delta(tensors).t()

    def delta_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self._update.delta_gradient(grad.t(), tensors)

    def work(self, tokens: int, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Work:
        return self._update.work(tokens, tensors, dtype)

    def fold(self, weight: Tensor, ratio: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        total = self._update.fold(weight.t(), None, tensors).t()
        return total if ratio is None else (total * ratio.unsqueeze(1)).to(weight.dtype)
