"""Tensors that FSDP2 (``fully_shard``) has spread over several processes, of which each holds a part (DTensors).

What is whole of such a tensor is gathered for one look at it, and goes with that look: no process holds more than one
weight whole beside its parts. All processes must look at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from trimtab.errors import SurgeryError

_alone = False


def is_spread(tensor: Any) -> bool:
    """Whether this process holds no more than a part of ``tensor``."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """``tensor``; where it is spread, all of it, without a history, for which all processes must ask."""
    if not is_spread(tensor):
        if hasattr(tensor, "ds_id"):
            raise SurgeryError(
                "the model's weights are spread over the processes by DeepSpeed (ZeRO-3), which does not hand them to "
                "the backward pass of an adapted layer. Use FSDP2 (fully_shard), or DistributedDataParallel"
            )
        return tensor  # type: ignore[no-any-return]
    if _alone:
        raise RuntimeError("a spread tensor is read while the other processes do something else")
    gathered: Tensor = tensor.detach().full_tensor()
    return gathered


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this process does what the others do not, and so cannot gather anything: an error then, and no
    waiting for ever."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def write(into: Any, value: Tensor) -> None:
    """Copy ``value``, which is whole and the same in all processes, into a tensor that may be spread."""
    if is_spread(into):
        into.to_local().copy_(_part(value, into))
    else:
        into.copy_(value)


def _part(value: Tensor, spread: Any) -> Tensor:
    """What of ``value`` lies in this process where it is spread as ``spread`` is."""
    for dimension, placement in enumerate(spread.placements):
        if placement.is_shard():
            pieces = value.chunk(spread.device_mesh.size(dimension), placement.dim)
            at = spread.device_mesh.get_local_rank(dimension)
            value = pieces[at] if at < len(pieces) else value.narrow(placement.dim, 0, 0)
    return value
