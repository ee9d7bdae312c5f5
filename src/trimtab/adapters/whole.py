"""An adapter whose tensors are spread over several processes, saved by all of them and written by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from trimtab.errors import AdapterError
from trimtab.surgery.wrappers import synchronised_by


@contextmanager
def written_by_one(model: nn.Module, *, given: bool) -> Iterator[bool]:
    """A context in which a sharded ``model`` is saved by all processes together: gives whether this one writes, as the
    first of them does. It ends when all are done.

    ``given``: whether the tensors were gathered before, so that one process saves by itself.

    Raises AdapterError in all processes if it failed in one.
    """
    if given or synchronised_by(model) != "fully_shard":
        yield True
        return
    failed: str | None = None
    try:
        yield dist.get_rank() == 0
    except Exception as error:
        failed = str(error)
        raise
    finally:
        said: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(said, failed)
    if (elsewhere := next((one for one in said if one is not None), None)) is not None:
        raise AdapterError(f"another process could not save the adapter: {elsewhere}")
