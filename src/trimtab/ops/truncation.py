"""A change of a weight, ``dW [out, in]``, as a product ``B A`` of low rank: the best one, and how far it is off.

The best product of rank k is a projection of the outputs, ``B A = U U^T dW``, with the k most important directions
``U [out, k]``. Without anything known of the inputs, these are the first left singular vectors of dW (Eckart and Young
1936), and the error is the smallest in the Frobenius norm. Where the inputs' second moments ``H = E[x x^T]`` are known,
they are those of ``dW L`` with ``L L^T = H``, and the mean squared error of the outputs, ``E ||(dW - B A) x||^2``, is
the smallest. A projection asks for no inverse of L, and leaves a change of rank k or less as it is, whatever H says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_LEAST_RIDGE = 1e-6


class Moments(NamedTuple):
    """What is known of the inputs of a weight."""

    mean: Tensor
    """``E[x x^T] [in, in]`` in float64; ``[in]``, its diagonal, where the rest is zero (as of a look-up)."""
    inputs: int
    """From how many of them."""


@dataclass(frozen=True)
class Spectrum:
    """A change by the directions of its outputs, the most important one first.

    Attributes:
        basis: ``U [out, n]``, orthonormal columns; n is the rank of dW as far as float64 can tell.
        parts: ``U^T dW [n, in]``.
        values: ``[n]``, the singular values of ``dW`` or of ``dW L``.
        weight_energies: ``[n]``, the part of ``||dW||^2`` in each direction.
        output_energies: ``[n]``, that of ``E ||dW x||^2``; None without moments.
    """

    basis: Tensor
    parts: Tensor
    values: Tensor
    weight_energies: Tensor
    output_energies: Tensor | None

    @property
    def rank(self) -> int:
        """The rank that loses nothing."""
        return len(self.values)

    @property
    def errors(self) -> Tensor:
        """``[n + 1]``: the relative error where the first 0, 1, ..., n directions are kept: of the outputs where the
        inputs are known, else of the weight."""
        energies = self.weight_energies if self.output_energies is None else self.output_energies
        left = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
        return (left / left[0]).sqrt() if left[0] > 0 else torch.zeros_like(left)

    def bound(self, rank: int) -> float:
        """The first singular value that is left out: ``||(dW - B A) x|| <= bound * ||x||`` for every x; where the
        inputs are known, no direction of the outputs is off by more in the root of its mean square."""
        return float(self.values[rank]) if rank < self.rank else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``A [rank, in]`` and ``B [out, rank]``, whose rows and columns are of one length, so that neither leaves the
        range of a half-precision dtype that a reader stores them in. Beyond the rank of dW they are zero."""
        kept = min(rank, self.rank)
        a, b = self.parts.new_zeros(rank, self.parts.shape[1]), self.basis.new_zeros(self.basis.shape[0], rank)
        lengths = self.weight_energies[:kept].pow(0.25)  # the root of the length of each part
        a[:kept] = self.parts[:kept] / lengths.unsqueeze(1)
        b[:, :kept] = self.basis[:, :kept] * lengths
        return a, b


def spectrum(delta: Tensor, moments: Moments | None = None) -> Spectrum:
    """The directions of ``delta``, which is dW ``[out, in]`` in float64."""
    weighed = delta if moments is None else _times_root(delta, moments)
    left, values, _ = torch.linalg.svd(weighed, full_matrices=False)
    floor = max(weighed.shape) * torch.finfo(values.dtype).eps * (values[0] if len(values) else 0.0)
    basis = left[:, : int((values > floor).sum())]
    parts = basis.mT @ delta
    return Spectrum(
        basis=basis,
        parts=parts,
        values=values[: basis.shape[1]],
        weight_energies=parts.square().sum(1),
        output_energies=None if moments is None else _energies(parts, moments.mean),
    )


def output_norm(delta: Tensor, moments: Moments) -> float:
    """``sqrt(E ||dW x||^2)`` for ``delta [out, in]``."""
    return float(_energies(delta, moments.mean).sum().clamp_min(0).sqrt())


def _energies(rows: Tensor, mean: Tensor) -> Tensor:
    """``r H r^T`` for each row."""
    through = rows * mean if mean.dim() == 1 else rows @ mean
    energies: Tensor = (through * rows).sum(1).clamp_min(0)
    return energies


def _times_root(delta: Tensor, moments: Moments) -> Tensor:
    """``dW L`` with ``L L^T = H + ridge I``. Inputs that were never met count a little, too: the fewer inputs there
    were, the more (``_ridge``)."""
    mean = moments.mean
    size = mean.shape[0]
    trace = mean.sum() if mean.dim() == 1 else mean.diagonal().sum()
    if not trace > 0:  # nothing but zeros came in
        return delta
    ridge = _ridge(float(trace), float(mean.square().sum()), size, moments.inputs) * trace / size
    if mean.dim() == 1:
        scaled: Tensor = delta * (mean + ridge).sqrt()
        return scaled
    root = torch.linalg.cholesky(mean + ridge * torch.eye(size, dtype=mean.dtype, device=mean.device))
    weighed: Tensor = delta @ root
    return weighed


def _ridge(trace: float, squares: float, size: int, count: int) -> float:
    """How much of ``(tr H / size) I`` is added to H: the shrinkage of a second moment that was estimated from
    ``count`` inputs (OAS: Chen, Wiesel, Eldar, Hero 2010, arXiv 0907.4698), as a ratio to H's own share."""
    spread = (count + 1 - 2 / size) * (squares - trace**2 / size)
    share = ((1 - 2 / size) * squares + trace**2) / spread if spread > 0 else 1.0
    return max(_LEAST_RIDGE, share / (1 - share)) if share < 0.5 else 1.0
