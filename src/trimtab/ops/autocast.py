"""The dtypes of tensors: what autocast would make of one, how to keep it out, and a quick cast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would multiply on the device of ``tensor``; None where it is off."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is off on the device of ``tensor``."""
    return nullcontext() if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes a microsecond where there is nothing to do, and this a tenth of it."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype=dtype)


def at_least(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` with no fewer digits than ``dtype`` has."""
    return cast(tensor, torch.promote_types(tensor.dtype, dtype))


def scaled_to(tensor: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor * factor`` in ``dtype``, computed in the wider of the two dtypes: numbers that are trained in fewer
    digits than a layer has are not rounded to these once more."""
    return cast(at_least(tensor, dtype) * factor, dtype)
