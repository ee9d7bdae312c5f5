"""Trained tensors that are spread over several processes, made whole to be saved."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trimtab.errors import AdapterError
from trimtab.methods import Method
from trimtab.surgery.wrappers import synchronised_by, whole, without_wrappers


@contextmanager
def whole_tensors(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """A context in which the modules of ``model`` that train, or that count statistics, hold whole tensors where theirs
    are sharded (FSDP2's), so that what saves them need not know of it. The tensors come from ``state_dict`` where it
    has them. Else all processes gather them, and therefore must enter together."""
    given = state_dict or {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}  # a parameter of two modules stays one
    try:
        for prefix, holder in list(model.named_modules()):
            own = {key: parameter for key, parameter in holder._parameters.items() if parameter is not None}
            trains = isinstance(holder, Method) or any(parameter.requires_grad for parameter in own.values())
            if not trains and not isinstance(holder, _NormBase):
                continue
            for key, parameter in own.items():
                name = without_wrappers(model, f"{prefix}.{key}" if prefix else key)
                value = given.get(name, whole(parameter))
                if value is not parameter:
                    replaced.append((holder, key, parameter))
                    holder._parameters[key] = made.setdefault(id(parameter), _parameter(value, parameter.requires_grad))
        yield
    finally:
        for holder, key, parameter in replaced:
            holder._parameters[key] = parameter


@contextmanager
def written_by_one(model: nn.Module, target: Path, *, given: bool) -> Iterator[Path]:
    """A context in which a sharded ``model`` is saved by all processes together: gives where this one writes, which is
    ``target`` in the first of them, and a folder that nobody reads in the others. It ends when all are done.

    ``given``: whether the tensors were gathered before, so that one process saves by itself.

    Raises AdapterError in all processes if it failed in one.
    """
    if given or synchronised_by(model) != "fully_shard":
        yield target
        return
    failed: str | None = None
    try:
        if dist.get_rank() == 0:
            yield target
        else:
            with tempfile.TemporaryDirectory() as unread:
                yield Path(unread) / target.name
    except Exception as error:
        failed = str(error)
        raise
    finally:
        said: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(said, failed)
    if (elsewhere := next((one for one in said if one is not None), None)) is not None:
        raise AdapterError(f"another process could not save the adapter: {elsewhere}")


def _parameter(value: Tensor, trained: bool) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=trained)
