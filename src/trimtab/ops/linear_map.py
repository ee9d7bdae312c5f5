"""How a batch goes through a weight: all in which a matrix product, a look-up and a convolution differ.

A map belongs to no particular weight: the frozen W, a weight formed from it such as ``c (W + dV)``, and a factor
``A [rank, in]`` all go through the same one. Whatever shape the layer's output has, a product is a matrix
``[tokens, out]`` here, so that the ratio, the bias and the factor ``B [out, rank]`` are the same for all maps.

    rows      the batch, in the form that the products read; for a matrix ``[tokens, in]``
    product   ``x W^T [tokens, out]``, or ``[batch, out, places]`` where the channels come first
    output    that product, in the shape in which the layer gives it

A new kind of layer is a new map, in the file of its base. Those of plain matrices (linear layers, ``Conv1D``, whatever
the weight is stored in) share ``MATRIX``. A stack of experts is as many matrices, each for tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.autocast import cast
from trimtab.ops.traced import seen_through


class LinearMap(Protocol):
    """How a batch goes through a weight ``[out, in]``, and how gradients come back. Nothing here is differentiated by
    autograd but by way of ``multiply``."""

    @property
    def takes_factors(self) -> bool:
        """Whether ``A [rank, in]`` goes through the map on its own, and its product through a factor ``B``. Else even a
        thin update is built in full."""

    @property
    def follows_autocast(self) -> bool:
        """Whether autocast changes the dtype in which the bare layer computes."""

    @property
    def reads_features(self) -> bool:
        """Whether a batch is a tensor ``[..., in]`` of features, which can be scaled, dropped and added up one by one.
        Else an update that would do that is built in full and goes through the map as a weight does."""

    @property
    def ungrouped(self) -> LinearMap:
        """The same map without groups, where it has some."""

    def rows(self, x: Tensor) -> Tensor:
        """``x`` as the products read it."""

    def tokens(self, rows: Tensor) -> int:
        """How many vectors ``[out]`` the product of these rows has."""

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``, a new tensor."""

    def output(self, product: Tensor, shape: Sequence[int]) -> Tensor:
        """``product`` as the layer gives it for an ``x`` of ``shape``."""

    def product_gradient(self, grad_output: Tensor) -> Tensor:
        """The gradient of the layer's output as one of the product."""

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """``grad W``: the gradient of the rows of an ``x`` of ``shape``, for the gradient of a product."""

    def add_input_gradient(self, target: Tensor, grad: Tensor, weight: Tensor) -> None:
        """Add ``grad W`` to ``target``, the gradient of the rows, in place."""

    def weight_gradient(self, grad: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """``grad^T x``: the gradient of a weight of ``shape``, for the gradient of a product."""


class MatrixMap:
    """A matrix product over the last dimension."""

    reads_features = takes_factors = follows_autocast = True

    @property
    def ungrouped(self) -> MatrixMap:
        return self

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def tokens(self, rows: Tensor) -> int:
        return rows.shape[0]

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(rows, weight, bias)

    def output(self, product: Tensor, shape: Sequence[int]) -> Tensor:
        if len(shape) == 2:
            return product
        if seen_through():
            return product.reshape(*shape[:-1], product.shape[-1])  # of whatever sizes there will be
        # Not a view: autograd refuses to change a view that a custom function returned in place, and models do.
        shaped: Tensor = torch.ops.aten._unsafe_view(product, [*shape[:-1], product.shape[-1]])
        return shaped

    def product_gradient(self, grad_output: Tensor) -> Tensor:
        return grad_output.reshape(-1, grad_output.shape[-1])

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        return grad.mm(weight)

    def add_input_gradient(self, target: Tensor, grad: Tensor, weight: Tensor) -> None:
        target.addmm_(grad, weight)

    def weight_gradient(self, grad: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
        return grad.t().mm(rows)


MATRIX = MatrixMap()


def multiply(through: LinearMap, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` as the layer gives it, in the dtype of the weight; differentiable in all three."""
    bias = None if bias is None else cast(bias, weight.dtype)
    return through.output(through.product(through.rows(x), weight, bias), x.shape)
