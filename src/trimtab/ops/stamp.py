"""Whether a tensor still is what it was when something was computed from it.

What is computed from a frozen weight once (its norms) and used in every step must follow the weight, whatever happens
to it: ``load_state_dict``, with ``assign`` or without, ``to_empty``, another dtype or device, offloading, a changed
vocabulary, a tie, an assignment, a change in place. Such changes leave another tensor, another place in memory or
another version. One way leaves none of these, writing through ``weight.data``. So on a processor numbers are compared,
too: all of a small weight, and of a large one enough to meet every row and every column. On an accelerator that would
mean waiting for it at every layer, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.ops.spread import is_spread

_SMALL = 1 << 14
"""Up to so many numbers all are compared."""


class Stamp:
    """What ``tensors`` were when this was made."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._marks = [_Mark(tensor) for tensor in tensors]

    def fits(self, tensors: Sequence[Tensor], quickly: bool = False) -> bool:
        """Whether ``tensors`` still are what they were; ``quickly``: without comparing numbers."""
        pairs = zip(self._marks, tensors, strict=False)
        return len(tensors) == len(self._marks) and all(mark.fits(tensor, quickly) for mark, tensor in pairs)


class _Mark:
    __slots__ = ("_history", "_sample")

    def __init__(self, tensor: Tensor) -> None:
        self._history = _history(tensor)
        sample = _sample(tensor)
        self._sample = None if sample is None else sample.clone()

    def fits(self, tensor: Tensor, quickly: bool) -> bool:
        if self._history is None or self._history != _history(tensor):
            return False
        if quickly or self._sample is None:
            return True
        sample = _sample(tensor)
        return sample is not None and torch.equal(self._sample, sample)


def _history(tensor: Tensor) -> tuple[Any, ...] | None:
    """Which tensor it is, where it lies and how often it was changed; None where it does not say."""
    if is_spread(tensor):
        return None
    if is_fake(tensor):
        return tensor._version, tensor.dtype, tensor.shape
    inference = tensor.is_inference()  # those have no version
    if inference and tensor.device.type != "cpu":
        return None
    try:
        version = version_of(tensor)
        # Its number in Python, and no reference to it: torch.utils.swap_tensors refuses a tensor that has one.
        return id(tensor), version, tensor.data_ptr(), tensor.dtype, tensor.shape
    except RuntimeError:  # subclasses whose numbers lie elsewhere
        return None


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one of those with which a step is traced: it lies nowhere and has no numbers."""
    return type(tensor).__name__ == "FakeTensor"


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written to; -1 for those of inference mode, which do not count it."""
    return -1 if tensor.is_inference() else tensor._version


def address_of(tensor: Tensor) -> int:
    """Where the numbers of ``tensor`` lie; 0 where it has none."""
    return 0 if is_fake(tensor) else tensor.data_ptr()


def _sample(tensor: Tensor) -> Tensor | None:
    """Some numbers of ``tensor``, a view; None where reading them would make an accelerator wait, or there are none."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or is_fake(tensor) or is_spread(tensor):
        return None
    tensor = tensor.detach()
    if tensor.numel() <= _SMALL:
        return tensor
    if not tensor.is_contiguous():
        if tensor.dim() < 2 or not tensor.mT.is_contiguous():
            return tensor[..., 0]
        tensor = tensor.mT
    # Every stride-th number, where the stride is smaller than a row and shares no factor with its length: whichever
    # row or column was changed as a whole, one of them lies in it.
    columns = tensor.shape[-1]
    stride = max(1, min(columns, tensor.numel() // columns) - 1)
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return torch.as_strided(tensor, (-(-tensor.numel() // stride),), (stride,), tensor.storage_offset())
