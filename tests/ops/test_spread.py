"""The part of a whole tensor that one process writes, and what is refused: against torch's own way of sharding."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from trimtab.ops.spread import alone, is_spread, whole, write


class Mesh(NamedTuple):
    """Processes in rows and columns, of which this one stands at ``here``."""

    sizes: tuple[int, ...]
    here: tuple[int, ...]

    def size(self, dimension: int) -> int:
        return self.sizes[dimension]

    def get_local_rank(self, dimension: int) -> int:
        return self.here[dimension]


class Spread:
    """What is asked of a DTensor, without other processes."""

    def __init__(self, full: Tensor, local: Tensor, placements: tuple[Any, ...], device_mesh: Mesh) -> None:
        self.full, self.local, self.placements, self.device_mesh = full, local, placements, device_mesh

    def detach(self) -> Spread:
        return Spread(self.full.detach(), self.local.detach(), self.placements, self.device_mesh)

    def full_tensor(self) -> Tensor:
        return self.full

    def to_local(self) -> Tensor:
        return self.local


@pytest.mark.parametrize(
    ("placements", "mesh", "mine"),
    [
        ((Shard(0),), Mesh((3,), (1,)), (slice(2, 4), slice(None))),
        ((Shard(1),), Mesh((2,), (1,)), (slice(None), slice(2, 3))),
        ((Shard(0),), Mesh((4,), (3,)), (slice(5, 5), slice(None))),  # five rows in twos: nothing for the last
        ((Shard(1),), Mesh((4,), (3,)), (slice(None), slice(3, 3))),
        ((Replicate(), Shard(0)), Mesh((2, 3), (1, 2)), (slice(4, 5), slice(None))),
        ((Shard(0), Shard(1)), Mesh((2, 3), (1, 0)), (slice(3, 5), slice(0, 1))),
    ],
    ids=str,
)
def test_each_process_writes_its_own_part(placements: Any, mesh: Mesh, mine: tuple[slice, slice]) -> None:
    value = torch.arange(15.0).view(5, 3)
    local = torch.full_like(value[mine], -1.0)
    write(Spread(value, local, placements, mesh), value)
    assert torch.equal(local, value[mine])


def test_what_is_spread_is_gathered_by_all_or_not_at_all() -> None:
    full = torch.randn(4, 3, requires_grad=True)
    spread = Spread(full, full[:2], (Shard(0),), Mesh((2,), (0,)))
    assert is_spread(spread)
    assert not is_spread(full)
    assert torch.equal(whole(spread), full)
    assert not whole(spread).requires_grad, "what is gathered has no history"
    assert whole(full) is full
    with pytest.raises(RuntimeError, match="while the other processes do something else"), alone():
        whole(spread)
    assert torch.equal(whole(spread), full), "and afterwards it may be read again"
