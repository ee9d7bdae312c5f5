"""What a run asks of several processes, and what the user is told of them."""

from __future__ import annotations

from trimtab.config.run import RunConfig
from trimtab.errors import ConfigError
from trimtab.processes import here


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
