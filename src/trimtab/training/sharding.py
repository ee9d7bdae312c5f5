"""Frozen weights spread over several processes (FSDP2, ``torch.distributed.fsdp.fully_shard``).

Each process keeps a part of the weights of each block, and a block is whole only while it is computed. What is trained
stays whole in every process, and so does what lies outside of the blocks (embedding, last norm, head): it is small
beside them, it is read from many places, and its gradients are summed like an adapter's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from trimtab.errors import ModelError
from trimtab.processes import here
from trimtab.surgery.adapted import block_lists

T = TypeVar("T")


class Inside(nn.Module):
    """Does any work with ``model`` as if it were its forward pass, which is when sharded weights can be used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def shard(root: Inside, model: nn.Module) -> None:
    """Spread the frozen weights in the blocks of ``model`` over the processes.

    Raises ModelError for a model without repeated blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = [block for blocks in block_lists(model) for block in blocks]
    if not blocks:
        raise ModelError(
            "train.sharding: full spreads the weights of repeated blocks, and this model has none; set it to none"
        )
    within = {id(parameter) for block in blocks for parameter in block.parameters() if not parameter.requires_grad}
    whole = {parameter for parameter in model.parameters() if id(parameter) not in within}
    mesh = init_device_mesh(next(model.parameters()).device.type, (here().size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(root, mesh=mesh, ignored_params=whole)
