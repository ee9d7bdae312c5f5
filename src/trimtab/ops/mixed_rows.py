"""A batch whose rows go through different updates of one frozen weight: one product with the weight for all of them,
and then each update on its own rows. Without gradients.

    y_i = c_a (x_i W^T + x_i dV_a^T) + bias_a        for row i, which is one of those of update a
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.autocast import cast
from trimtab.ops.cost import full_digits_for_few
from trimtab.ops.frozen_linear import Operands
from trimtab.ops.kernels import kernels_for
from trimtab.ops.linear_map import LinearMap


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


def mixed_product(x: Tensor, weight: Tensor, through: LinearMap, parts: Sequence[Part], order: Order | None) -> Tensor:
    """The output for ``x`` as a layer with the frozen ``weight [out, in]`` gives it.

    Args:
        x: the batch, in the dtype of ``weight`` or as ``through`` reads it.
        weight: the frozen weight.
        through: how a batch goes through it.
        parts: the rows of each update, which the operands say; all rows are in one of them. The rows are counted as
            ``through.rows`` gives them, and in ``order``.
        order: None where the rows of each part lie together as they come.
    """
    rows = through.rows(x)
    if order is not None:
        rows = rows.index_select(0, order.there)
    biases = [part.operands.bias for part in parts]
    shared = all(bias is biases[0] for bias in biases)
    product = through.product(rows, weight)
    work = full_digits_for_few(through.tokens(rows), product.dtype)
    fed = cast(rows, work) if rows.is_floating_point() else rows
    total = cast(product, work)
    for part, bias in zip(parts, biases, strict=True):
        _add(total[part.rows], fed[part.rows], part.operands._replace(bias=None if shared else bias))
    if shared and biases[0] is not None:
        total.add_(_beside(biases[0], total))
    total = cast(total, product.dtype)
    return through.output(total if order is None else total.index_select(0, order.back), x.shape)


def _add(product: Tensor, rows: Tensor, operands: Operands) -> None:
    """Make ``c (p + x dV^T) + bias`` of a product ``p`` in place."""
    update, tensors, ratio, bias = operands.update, operands.tensors, operands.ratio, operands.bias
    if update is not None:
        thin = update.thin(rows, tensors, operands.through, product.dtype)
        if thin is None:
            update.add_product(product, rows, tensors, operands.through)
        elif product.dim() == 2:
            product.addmm_(thin.inner, cast(thin.b, product.dtype).t(), alpha=thin.scale)
        else:
            kernels_for(product).forward(product, thin=thin, ratio=None, bias=None, in_place=True)
    if ratio is not None:
        if product.dim() == 2:
            ratio.times(product, in_place=True)
        else:
            ratio.times_rows(product, in_place=True)
    if bias is not None:
        product.add_(_beside(bias, product))


def _beside(bias: Tensor, product: Tensor) -> Tensor:
    """``bias [out]`` as it is added to a product; the channels of a convolution come before the places."""
    return cast(bias if product.dim() == 2 else bias.unsqueeze(1), torch.promote_types(bias.dtype, product.dtype))
