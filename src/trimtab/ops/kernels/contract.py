"""What a set of kernels does: the passes over ``[tokens, out]`` that an adapter adds to a frozen product.

    forward     ``y = c (p + s h B^T) + bias``           in place of p, if p is not wanted any more
    backward    over ``dy`` and ``y`` at once: ``sum dy``, ``sum dy y``, ``c dy``, ``(c dy) s B`` and ``s (c dy)^T h``

``p [tokens, out]`` is the product with the frozen weight, ``h [tokens, rank]`` that with A, ``c [out]`` the ratio.
(Behind a convolution it is ``p [batch, out, places]`` and ``h [batch, rank, places]``.) Each part may be missing.

And two over ``[out, in]``: ``squared_norms`` of the rows of ``W + s B A``, and ``fold``, which forms ``c (W + s B A)``.

A set of kernels is one file in this folder that defines these functions, taking from ``plain`` what it does no better,
and is held against ``trimtab.ops.reference``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from trimtab.ops.ratio import Ratio


class Thin(NamedTuple):
    """A product of low rank: ``s h B^T [tokens, out]``."""

    inner: Tensor
    """``h [tokens, rank]``: in the dtype of the product, or a wider one, in which the sum is then taken."""
    b: Tensor
    """``B [out, rank]`` as it is trained."""
    scale: float
    """``s``."""


class BackwardPass(NamedTuple):
    """What comes of one pass over the gradient ``dy [tokens, out]`` of an output."""

    grad: Tensor
    """``c dy [tokens, out]`` where it was asked for or there is no ratio; else ``dy``."""
    bias: Tensor | None = None
    """``sum dy [out]``, if asked for."""
    witnessed: Tensor | None = None
    """``sum dy y [out]``, if there is a ``y`` to read the gradient of the ratio from."""
    inner: Tensor | None = None
    """``(c dy) s B [tokens, rank]``, the gradient of ``h``; of a thin update."""
    b: Tensor | None = None
    """``s (c dy)^T h [out, rank]``, the gradient of ``B``; of a thin update."""


class Passes(Protocol):
    """The passes over ``[tokens, out]``, for one kind of device or one kind of weight."""

    def forward(
        self, product: Tensor, *, thin: Thin | None, ratio: Ratio | None, bias: Tensor | None, in_place: bool
    ) -> Tensor:
        """``c (p + s h B^T) + bias``. Afterwards ``product`` holds ``p + s h B^T``, or with ``in_place`` the output."""

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
        """What is asked for of ``grad = dy [tokens, out]``; ``witness`` is ``y [tokens, out]``."""


class KernelSet(Passes, Protocol):
    """What there is for one kind of device."""

    def squared_norms(self, weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
        """``||W + s B A||^2`` per row ``[out]`` in the dtype of ``squares``, which is ``||W||^2``."""

    def fold(self, weight: Tensor, ratio: Tensor | None, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
        """``c (W + s B A) [out, in]`` with ``ratio = c [out]``, None for 1: a new tensor that is laid out as W."""
