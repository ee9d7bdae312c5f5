"""Dropout that does not cost more than the product it stands before.

On a processor ``torch.nn.functional.dropout`` draws one random number per element, one after the other: measured on
1,000 x 576 values in bfloat16 it takes twice the time of the layer's whole matrix product. One 64-bit draw holds four
16-bit numbers, or eight of 8 bits where these are fine enough, and each decides one element.

The backward pass needs one byte an element, the mask, and applies it to the input once more. So the projections that
read one input share that input, and none keeps a copy of what dropout left of it. On devices with Triton's programs not
even the mask is kept: it is drawn again from a seed, inside of the products that read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.ops.kernels import dropping, dropping_for
from trimtab.ops.linear_map import MATRIX, LinearMap, MatrixMap

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as the elements that a mask goes over


class Keep(NamedTuple):
    """What dropout keeps of a tensor ``x``: ``scale * of(x)``."""

    mask: Tensor
    """-1, which is every bit, where an element is kept, else 0; int8, shape of ``x``."""
    scale: float

    def of(self, x: Tensor) -> Tensor:
        """``x`` where it is kept, else 0: a new tensor, without ``scale``. Not differentiable."""
        whole = _WHOLE[x.dtype.itemsize]
        # Masking bits takes half the time of a product with zeros and ones.
        return self.mask.to(whole).bitwise_and_(x.view(whole)).view(x.dtype)

    def inside(self, rows: Tensor, through: LinearMap, rank: int) -> LinearMap:
        """The map by which an update of so low a rank reads ``rows`` without what is dropped; ``through`` itself where
        they have to be written first."""
        return through


class Seeded(NamedTuple):
    """What dropout keeps of a tensor ``x``, as a seed from which every pass draws the same: ``scale * of(x)``."""

    seed: Tensor
    """int64 ``[1]``, on the device."""
    threshold: int
    """Of 2^32 equally likely draws so many drop an element."""

    @property
    def scale(self) -> float:
        return 1 / (1 - self.threshold / 2**32)

    def of(self, x: Tensor) -> Tensor:
        """``x`` where it is kept, else 0: a new tensor, without ``scale``. Not differentiable."""
        kept: Tensor = dropping().kept_of(x, self.seed, self.threshold)
        return kept

    def inside(self, rows: Tensor, through: LinearMap, rank: int) -> LinearMap:
        programs = dropping_for(rows) if through is MATRIX and rows.numel() else None
        return through if programs is None or rank > programs.RANKS else Dropped(self)


Drawn = Keep | Seeded


def drawn_again(kind: type[Drawn], kept: Tensor, number: float, rows: Tensor) -> Drawn:
    """What dropout keeps of ``rows``, from the tensor and the number that it was drawn as."""
    return Seeded(kept, int(number)) if kind is Seeded else Keep(kept.reshape(rows.shape), number)


class Dropped(MatrixMap):
    """A matrix product with what dropout keeps of the rows."""

    def __init__(self, keep: Seeded) -> None:
        self._drawn = keep.seed, keep.threshold

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found: Tensor = dropping().product(rows, weight, *self._drawn)
        return found

    def add_input_gradient(self, target: Tensor, grad: Tensor, weight: Tensor) -> None:
        dropping().add_input_gradient(target, grad, weight, *self._drawn)

    def weight_gradient(self, grad: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
        found: Tensor = dropping().weight_gradient(grad, rows, *self._drawn)
        return found


def draw_keep(x: Tensor, probability: float) -> Drawn | None:
    """Draw which elements of ``x`` are kept; each is dropped with ``probability``, to the nearest 1/65,536. None where
    that is 0.

    Reproducible from ``torch.manual_seed``.
    """
    if not torch.compiler.is_compiling() and dropping_for(x) is not None:
        seed = torch.empty(1, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        return Seeded(seed, min(round(probability * 2**32), 2**32 - 1))
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # accelerators draw in parallel
        drawn = torch.rand_like(x, dtype=torch.float32, requires_grad=False)
        return Keep((drawn >= probability).to(torch.int8).neg_(), 1 / (1 - probability))
    few = (probability * 256).is_integer()
    levels, kind = (256, torch.int8) if few else (65536, torch.int16)
    threshold = min(round(probability * levels), levels - 1)
    if threshold == 0:
        return None
    mask = torch.empty(x.shape, dtype=torch.int8)  # first, since it stays: what goes leaves no hole below it
    drawn = _random_words(1 + x.numel() * kind.itemsize // 8).view(kind)[: x.numel()].view(x.shape)
    return Keep(torch.ge(drawn, threshold - levels // 2, out=mask).neg_(), levels / (levels - threshold))


def _random_words(count: int) -> Tensor:
    """``count`` random int64, uniform over the whole range of the type. They come from a generator that is twice as
    fast as torch's own, which only gives the seed."""
    seed = torch.empty((), dtype=torch.int64).random_()
    if type(seed) is not Tensor:  # while a step is traced the seed has no value
        return torch.empty(count, dtype=torch.int64).random_(-(2**63), None)
    return torch.from_numpy(np.random.SFC64(int(seed)).random_raw(count).view(np.int64))


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero each element of ``x`` with ``probability`` and scale the others, so that the mean stays. Differentiable."""
    keep = draw_keep(x, probability)
    if keep is None:
        return x
    kept = keep.mask.to(x.dtype).neg_() if isinstance(keep, Keep) else keep.of(torch.ones_like(x))
    return torch.addcmul(x.new_zeros(()), x, kept, value=keep.scale)
