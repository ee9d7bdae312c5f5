"""A batch whose rows go through different updates of one frozen weight: one product with the weight for all of them,
and then each update on its own rows. Without gradients.

    y_i = c_a (x_i W^T + x_i dV_a^T) + bias_a        for row i, which is one of those of update a
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.ops.autocast import cast
from trimtab.ops.cost import full_digits_for_few
from trimtab.ops.frozen_linear import Operands
from trimtab.ops.kernels import kernels_for, segments_for
from trimtab.ops.linear_map import LinearMap, MatrixMap
from trimtab.ops.low_rank import LowRank
from trimtab.ops.square import Square
from trimtab.ops.update import Update


class Part(NamedTuple):
    """Some rows of a batch, which lie one after the other, and what they are multiplied with beside the weight."""

    rows: slice
    operands: Operands


class Order(NamedTuple):
    """The order in which the rows of each part lie together, and the way back."""

    there: Tensor
    back: Tensor


def takes(operands: Operands) -> bool:
    """Whether the update can be added to a product of some rows without being built."""
    update, through = operands.update, operands.through
    if update is None:
        return True
    return not update.only_built and (through.takes_factors if update.is_thin else through.reads_features)


class MixedProduct:
    """The product of a batch with a frozen weight ``[out, in]``, for batches of one size: what can be decided once is.

    Args:
        parts: the rows of each update, which the operands say; all rows are in one of them. The rows are counted as
            the map's ``rows`` gives them, and in ``order``.
        order: None where the rows of each part lie together as they come.
    """

    def __init__(self, parts: Sequence[Part], order: Order | None) -> None:
        self._parts, self._order = [part.operands for part in parts], order
        self._segments: Any = None
        self._sizes = [part.rows.stop - part.rows.start for part in parts]
        biases = [operands.bias for operands in self._parts]
        self._bias = biases[0] if all(bias is biases[0] for bias in biases) else None
        self._adds_bias = self._bias is None  # each part its own, if any
        # s, A^T and B^T of a thin update on a plain matrix, whose factors are two products without further ado.
        self._factors: list[tuple[float, Tensor, Tensor] | None] = [
            (operands.update.scale, operands.tensors[0].t(), operands.tensors[1].t())
            if isinstance(operands.update, LowRank) and isinstance(operands.through, MatrixMap)
            else None
            for operands in self._parts
        ]

    def __call__(self, rows: Tensor, weight: Tensor, through: LinearMap) -> Tensor:
        """The product ``[tokens, out]`` (or ``[batch, out, places]``) of ``rows`` as ``through`` gives them, in the
        dtype of ``weight``, with all that is to be added; in the order in which they came."""
        programs = segments_for(rows) if rows.is_floating_point() else None
        if programs is not None and all(fits(operands, programs, rows) for operands in self._parts):
            product = through.product(rows, weight)
            if self._segments is None:
                sized = zip(self._sizes, self._parts, strict=True)
                segments = [segment(size, operands, programs) for size, operands in sized]
                there = None if self._order is None else self._order.there
                self._segments = programs.Segments(segments, there, rows)
            self._segments.add(product, rows)
            return product
        if self._order is not None:
            rows = rows.index_select(0, self._order.there)
        product = through.product(rows, weight)
        work = full_digits_for_few(through.tokens(rows), product.dtype, product.device)
        total, fed = cast(product, work), cast(rows, work) if rows.is_floating_point() else rows
        each = zip(total.split(self._sizes), fed.split(self._sizes), self._parts, self._factors, strict=True)
        for mine, x, operands, factors in each:
            if factors is not None:
                scale, a, b = factors
                mine.addmm_(x.mm(cast(a, work)), cast(b, work), alpha=scale)
            elif operands.update is not None:
                _add(mine, x, operands.update, operands)
            if operands.ratio is not None:
                scaled = operands.ratio.times if mine.dim() == 2 else operands.ratio.times_rows
                scaled(mine, in_place=True)
            if self._adds_bias and operands.bias is not None:
                mine.add_(_beside(operands.bias, mine))
        if self._bias is not None:
            total.add_(_beside(self._bias, total))
        total = cast(total, product.dtype)
        return total if self._order is None else total.index_select(0, self._order.back)


def fits(operands: Operands, programs: Any, rows: Tensor) -> bool:
    """Whether the rows of a part can be a segment of a batch like ``rows``."""
    update, ratio = operands.update, operands.ratio
    known = isinstance(operands.through, MatrixMap) and (update is None or type(update) in (LowRank, Square))
    found: bool = known and programs.takes(rows, operands.bias, None if ratio is None else ratio.values)
    return found and programs.takes(*operands.tensors)


def segment(size: int, operands: Operands, programs: Any) -> Any:
    """The rows of a part as a segment."""
    update, tensors = operands.update, operands.tensors
    return programs.Segment(
        size,
        thin=(*tensors, update.scale) if isinstance(update, LowRank) and len(tensors[0]) else None,
        square=(update, tensors[0]) if isinstance(update, Square) else None,
        ratio=None if operands.ratio is None else operands.ratio.values,
        bias=operands.bias,
    )


def _add(product: Tensor, rows: Tensor, update: Update, operands: Operands) -> None:
    """Add ``x dV^T`` to a product in place."""
    thin = update.thin(rows, operands.tensors, operands.through, product.dtype)
    if thin is None:
        update.add_product(product, rows, operands.tensors, operands.through)
    else:
        kernels_for(product).forward(product, thin=thin, ratio=None, bias=None, in_place=True)


def _beside(bias: Tensor, product: Tensor) -> Tensor:
    """``bias [out]`` as it is added to a product; the channels of a convolution come before the places."""
    return cast(bias if product.dim() == 2 else bias.unsqueeze(1), torch.promote_types(bias.dtype, product.dtype))
