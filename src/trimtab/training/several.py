"""Several processes that train one model: what a run asks of them, what the user is told, and how the frozen weights
are spread over them (FSDP2, ``torch.distributed.fsdp.fully_shard``).

Of spread weights each process keeps a part of those of each block, and a block is whole only while it is computed. What
is trained stays whole in every process, and so does what lies outside of the blocks (embedding, last norm, head): it is
small beside them, it is read from many places, and its gradients are summed like an adapter's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from trimtab.config.run import RunConfig
from trimtab.errors import ConfigError, ModelError
from trimtab.processes import here
from trimtab.surgery.adapted import block_lists

T = TypeVar("T")


def require_fit(config: RunConfig) -> None:
    """Settle how the processes that are here train ``config``. Raises ConfigError for what they cannot."""
    group, train = here(), config.train
    if group.size == 1:
        return
    group.sharded = group.sharded or train.sharding == "full"
    if train.batch_size % group.size:
        below, above = (train.batch_size // group.size * group.size, -(-train.batch_size // group.size) * group.size)
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"train.batch_size: {train.batch_size} rows of a forward pass are shared out among all processes, and "
            f"{group.size} cannot have equal shares; set it to {near}"
        )
    if group.sharded and train.learning_rate == "auto":
        raise ConfigError(
            "train.learning_rate: auto makes trials with the whole model in each process, and train.sharding: full is "
            "for models that are too large for that; find the rate with `trimtab tune`, or set one of the two"
        )
    if group.sharded and config.quantisation != "none":
        raise ConfigError(
            f"train.sharding: full spreads dense weights, and quantisation is {config.quantisation}; set one "
            "of the two to none"
        )


def told_of(config: RunConfig) -> str:
    """How the processes that are here train, in a sentence."""
    group, train = here(), config.train
    rows = train.batch_size // group.size
    how = "the frozen weights spread over them" if group.sharded else "each with the whole model"
    compiled = "; blocks are not compiled then" if group.sharded and train.compile is True else ""
    return f"{group.size} processes, {how}: {rows} of {train.batch_size} rows of a batch each{compiled}"


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
