"""How rows go through a stack of weights ``[experts, out, in]``, each through the one of its expert.

    SortedRows    the rows of one expert stand together, one expert after the other (grouped and batched products)
    ChosenRows    each row names its expert (transformers' ``batched_mm``, with which a few tokens are written)

Both are linear maps: the frozen stack W goes through them as the model itself multiplies with it, a stack of factors
``A [experts, rank, in]`` or ``B [experts, out, rank]`` expert by expert. They are kernel sets, too, since a product
``[rows, out]`` takes the B and the ratio of each row's expert. No weight ``[experts, out, in]`` is ever formed, and an
accelerator is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.autocast import cast, scaled_to
from trimtab.ops.kernels import kernels_for
from trimtab.ops.kernels.contract import BackwardPass, Thin
from trimtab.ops.ratio import HALF, Ratio

Frozen = Callable[[Tensor], Tensor]
"""``rows -> rows W^T``, as the model computes it."""
_THIN = 64  # rows or columns
_ALIGNED = 16  # bytes, of which the strides of a grouped product have to be multiples


class StackMap:
    """What both kinds of rows share: a linear map (``trimtab.ops.linear_map``) and its kernel set."""

    reads_features = takes_factors = follows_autocast = True

    def __init__(self, weight: Tensor, frozen: Frozen) -> None:
        self._weight, self._frozen = weight, frozen

    # What a kind of rows says --------------------------------------------------------------------------------------

    def times(self, rows: Tensor, stack: Tensor) -> Tensor:
        """``rows [rows, k]``, each times its matrix of ``stack [experts, k, n]``: ``[rows, n]``."""
        raise NotImplementedError

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """``left^T right`` over the rows of each expert: ``[experts, n, k]`` for ``[rows, n]`` and ``[rows, k]``."""
        raise NotImplementedError

    def experts(self, rows: int) -> Tensor:
        """The expert of each of the ``rows`` rows."""
        raise NotImplementedError

    def repeated(self, times: int) -> StackMap:
        """The same for rows that are each cut into ``times``, which stand one after the other."""
        raise NotImplementedError

    # The linear map ------------------------------------------------------------------------------------------------

    def rows(self, x: Tensor) -> Tensor:
        return x

    @property
    def ungrouped(self) -> StackMap:
        return self

    def tokens(self, rows: Tensor) -> int:
        return rows.shape[0]

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._frozen(rows) if weight is self._weight else self.times(rows, weight.mT)

    def output(self, product: Tensor, shape: Sequence[int]) -> Tensor:
        # No view of what is made in a custom function: models add their experts' biases to it in place.
        shaped: Tensor = torch.ops.aten._unsafe_view(product, list(product.shape))
        return shaped

    def product_gradient(self, grad_output: Tensor) -> Tensor:
        return grad_output

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        return self.times(grad, weight)

    def add_input_gradient(self, target: Tensor, grad: Tensor, weight: Tensor) -> None:
        target.add_(self.times(grad, weight))

    def weight_gradient(self, grad: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
        return self.outer(grad, rows)

    # The kernel set ------------------------------------------------------------------------------------------------

    def forward(
        self, product: Tensor, *, thin: Thin | None, ratio: Ratio | None, bias: Tensor | None, in_place: bool
    ) -> Tensor:
        """``c (p + s h B^T)``. Afterwards ``product`` holds ``p + s h B^T``, or with ``in_place`` the output."""
        if thin is not None:
            inner, b, scale = thin
            product.add_(self.times(inner, scaled_to(b, scale, inner.dtype).mT))
        return product if ratio is None else self._of_rows(ratio, product).times(product, in_place)

    def backward(
        self,
        grad: Tensor,
        *,
        thin: Thin | None,
        ratio: Ratio | None,
        witness: Tensor | None,
        wants_bias: bool,
        wants_scaled: bool,
    ) -> BackwardPass:
        """What is asked for of ``grad = dy [rows, out]``; ``witness`` is ``y [rows, out]``."""
        witnessed = None
        if witness is not None:
            witnessed = grad.new_zeros(self._weight.shape[0], grad.shape[1], dtype=_full(grad.dtype))
            witnessed.index_add_(0, self.experts(grad.shape[0]), (grad * witness).to(witnessed.dtype))
        if ratio is not None and wants_scaled:
            grad, ratio = self._of_rows(ratio, grad).times(grad), None
        if thin is None:
            return BackwardPass(grad, None, witnessed)
        inner, b, scale = thin
        factor = scale if ratio is None else (scale * ratio.values).unsqueeze(-1)
        grad_inner = self.times(grad, scaled_to(b, factor, grad.dtype))
        grad_b = self.outer(grad, inner) * factor
        return BackwardPass(grad, None, witnessed, grad_inner, cast(grad_b, b.dtype))

    def _of_rows(self, ratio: Ratio, like: Tensor) -> Ratio:
        """``ratio [experts, out]`` for every row of ``like``."""
        experts = self.experts(like.shape[0])
        if ratio.excess is not None and ratio.excess.dtype == like.dtype:
            return Ratio(ratio.values, ratio.near_one, ratio.excess[experts])
        return Ratio(ratio.values[experts], ratio.near_one, None)


class SortedRows(StackMap):
    """Rows sorted by expert: those of expert e end before row ``ends[e]`` (int32, ``[experts]``).

    On a processor each expert's rows are multiplied in turn; elsewhere by grouped products.
    """

    def __init__(self, weight: Tensor, frozen: Frozen, ends: Tensor) -> None:
        super().__init__(weight, frozen)
        self._ends = ends
        self._in_turn = (
            ends.device.type == "cpu" and type(ends) is Tensor
        )  # while a step is traced, ends have no values
        self._stops = ends.tolist() if self._in_turn else []

    def repeated(self, times: int) -> StackMap:
        return SortedRows(self._weight, self._frozen, self._ends * times)

    def experts(self, rows: int) -> Tensor:
        numbers = torch.arange(rows, device=self._ends.device, dtype=self._ends.dtype)
        found = torch.searchsorted(self._ends, numbers, right=True)
        return found.clamp_max_(len(self._ends) - 1)  # rows behind the last end belong to nobody, and are not read

    def _each(self) -> Iterator[tuple[int, slice]]:
        """The experts that have rows, and where these stand."""
        start = 0
        for expert, stop in enumerate(self._stops):
            if start < stop:
                yield expert, slice(start, stop)
            start = stop

    def times(self, rows: Tensor, stack: Tensor) -> Tensor:
        if not self._in_turn:
            return _grouped(rows, stack, self._ends)
        product = rows.new_zeros(rows.shape[0], stack.shape[2])
        for expert, mine in self._each():
            if _is_thin(stack):
                product[mine] = _wide(rows[mine]).mm(_wide(stack[expert]))
            else:
                torch.mm(rows[mine], stack[expert], out=product[mine])
        return product

    def add_input_gradient(self, target: Tensor, grad: Tensor, weight: Tensor) -> None:
        if not self._in_turn:
            super().add_input_gradient(target, grad, weight)
            return
        for expert, mine in self._each():
            if _is_thin(weight) and target.dtype in HALF:
                target[mine].add_(_wide(grad[mine]).mm(_wide(weight[expert])))
            else:
                target[mine].addmm_(grad[mine], weight[expert])

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        if not self._in_turn:
            return _grouped_outer(left, right, self._ends)
        product = left.new_zeros(len(self._stops), left.shape[1], right.shape[1])
        for expert, mine in self._each():
            product[expert] = _wide(left[mine]).t().mm(_wide(right[mine]))
        return product

    def forward(
        self, product: Tensor, *, thin: Thin | None, ratio: Ratio | None, bias: Tensor | None, in_place: bool
    ) -> Tensor:
        if not self._in_turn:
            return super().forward(product, thin=thin, ratio=ratio, bias=bias, in_place=in_place)
        kernels = kernels_for(product)
        output = product if ratio is None or in_place else torch.empty_like(product)
        for expert, mine in self._each():
            part = kernels.forward(
                product[mine],
                thin=None if thin is None else Thin(_wide(thin.inner[mine]), thin.b[expert], thin.scale),
                ratio=_of_expert(ratio, expert),
                bias=None,
                in_place=in_place,
            )
            if output is not product:
                output[mine] = part
        return output

    def backward(
        self,
        grad: Tensor,
        *,
        thin: Thin | None,
        ratio: Ratio | None,
        witness: Tensor | None,
        wants_bias: bool,
        wants_scaled: bool,
    ) -> BackwardPass:
        if not self._in_turn:
            return super().backward(
                grad, thin=thin, ratio=ratio, witness=witness, wants_bias=wants_bias, wants_scaled=wants_scaled
            )
        kernels = kernels_for(grad)
        scaled = torch.zeros_like(grad) if ratio is not None and wants_scaled else grad
        witnessed = None if witness is None else grad.new_zeros(len(self._stops), grad.shape[1])
        inner = None if thin is None else torch.zeros_like(thin.inner)
        grad_b = None if thin is None else torch.zeros_like(thin.b)
        for expert, mine in self._each():
            passed = kernels.backward(
                grad[mine] if thin is None else _wide(grad[mine]),
                thin=None if thin is None else Thin(_wide(thin.inner[mine]), thin.b[expert], thin.scale),
                ratio=_of_expert(ratio, expert),
                witness=None if witness is None else witness[mine],
                wants_bias=False,
                wants_scaled=wants_scaled,
            )
            if scaled is not grad:
                scaled[mine] = passed.grad
            for into, part in ((witnessed, passed.witnessed), (grad_b, passed.b)):
                if into is not None and part is not None:
                    into[expert] = part
            if inner is not None and passed.inner is not None:
                inner[mine] = passed.inner
        return BackwardPass(scaled, None, witnessed, inner, grad_b)


class ChosenRows(StackMap):
    """Rows of which each names its expert: ``chosen [rows]``."""

    def __init__(self, weight: Tensor, frozen: Frozen, chosen: Tensor) -> None:
        super().__init__(weight, frozen)
        self._chosen = chosen

    def repeated(self, times: int) -> StackMap:
        return ChosenRows(self._weight, self._frozen, self._chosen.repeat_interleave(times))

    def experts(self, rows: int) -> Tensor:
        return self._chosen

    def times(self, rows: Tensor, stack: Tensor) -> Tensor:
        return torch.bmm(rows.unsqueeze(1), stack[self._chosen]).squeeze(1)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        full = _full(left.dtype)
        product = left.new_zeros(self._weight.shape[0], left.shape[1], right.shape[1], dtype=full)
        product.index_add_(0, self._chosen, left.unsqueeze(2).to(full) * right.unsqueeze(1))
        return product.to(left.dtype)


def _is_thin(stack: Tensor) -> bool:
    return min(stack.shape[1:]) <= _THIN


def _wide(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype in which a processor multiplies thin matrices. In half precision it would compile a
    kernel for every number of rows, which differs by expert and by batch."""
    return cast(tensor, _full(tensor.dtype))


def _of_expert(ratio: Ratio | None, expert: int) -> Ratio | None:
    if ratio is None:
        return None
    return Ratio(ratio.values[expert], ratio.near_one, None if ratio.excess is None else ratio.excess[expert])


def _grouped(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """``rows [rows, k]`` sorted by expert times ``stack [experts, k, n]``, padded to the strides that torch takes."""
    n = stack.shape[2]
    if excess := -rows.shape[1] % _unit(rows):
        rows, stack = F.pad(rows, (0, excess)), F.pad(stack, (0, 0, 0, excess))
    if stack.stride(2) == 1 and (excess := -n % _unit(stack)):
        stack = F.pad(stack, (0, excess))
    return F.grouped_mm(rows, stack, offs=ends)[:, :n]


def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``left^T right`` over the rows of each expert, padded likewise."""
    n, k = left.shape[1], right.shape[1]
    left, right = (F.pad(one, (0, -one.shape[1] % _unit(one))) for one in (left, right))
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0  # for an expert without rows nothing is written
    return F.grouped_mm(left.t(), right, offs=ends)[:, :n, :k].masked_fill(empty.view(-1, 1, 1), 0)


def _full(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over rows are gathered."""
    return torch.promote_types(dtype, torch.float32)


def _unit(tensor: Tensor) -> int:
    return _ALIGNED // tensor.dtype.itemsize
