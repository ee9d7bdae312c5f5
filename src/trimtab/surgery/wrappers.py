"""What torch puts around a model: data parallelism, sharding, compilation, checkpointing. None of it changes the names
that the model's own parts have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The class that wraps -> the attribute that holds what is wrapped. By name: most programs need none of these modules.
_HELD_IN = {
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): "_checkpoint_wrapped_module",
}


def _attribute(kind: type) -> str | None:
    """The attribute in which a wrapper of this class holds its module; None for a class that wraps nothing."""
    places = ((parent.__module__, parent.__name__) for parent in kind.__mro__)
    return next((_HELD_IN[place] for place in places if place in _HELD_IN), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """``module`` without the wrappers around it, however they are nested."""
    while (attribute := _attribute(type(module))) is not None:
        module = module._modules[attribute]  # type: ignore[assignment]
    return module


def synchronised_by(model: nn.Module) -> str | None:
    """What keeps the parameters of ``model`` alike in several processes, and would not know of parameters that come
    later; None in one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    while (attribute := _attribute(type(model))) is not None:
        if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            return type(model).__name__
        model = model._modules[attribute]  # type: ignore[assignment]
    return "fully_shard" if any(callable(getattr(module, "reshard", None)) for module in model.modules()) else None


def split_by_plan(model: nn.Module) -> bool:
    """Whether weights of ``model`` lie in parts in several processes by a tensor-parallel plan (``tp_plan``): as
    DTensors that nothing gathers before they are used."""
    parts = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return parts and not any(callable(getattr(module, "reshard", None)) for module in model.modules())


def without_wrappers(model: nn.Module, name: str) -> str:
    """``name``, of a module or a parameter of ``model``, as it is where nothing inside ``model`` is wrapped."""
    kept = []
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None or part != _attribute(type(module)):
            kept.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join(kept)


def whole(tensor: Any) -> Tensor:
    """``tensor``, or all of it where it is sharded over several processes, which then must all ask for it."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def write(into: Any, value: Tensor) -> None:
    """Copy ``value``, which is whole, into a parameter or buffer that may be sharded."""
    if hasattr(into, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(into.device, into.dtype), into.device_mesh, into.placements)
    into.copy_(value)


@contextmanager
def unsharded(model: nn.Module, *, changes: bool = False, only: nn.Module | None = None) -> Iterator[bool]:
    """A context in which the weights that FSDP2 (``fully_shard``) has sharded are whole, for which all processes must
    enter it. With ``changes``, what becomes of them there (their values, and whether they are trained) is kept when it
    ends. Gives whether there are any; a view of one has no memory any more afterwards.

    ``only``: a module inside of ``model``, whose weights are all that is gathered, with those that lie in one piece
    with them."""
    sharded: list[Any] = [module for module in model.modules() if callable(getattr(module, "reshard", None))]
    if only is not None:
        around = [module for module in sharded if any(inner is only for inner in module.modules())]
        inside = [module for module in only.modules() if callable(getattr(module, "reshard", None))]
        sharded = [*around[-1:], *(module for module in inside if module not in around)]
    if not sharded:
        yield False
        return
    for module in sharded:
        module.unshard()
    try:
        yield True
    finally:
        with torch.no_grad():
            for module in sharded:
                _put_away(module, changes=changes)


def _put_away(module: Any, *, changes: bool) -> None:
    """Shard the weights of one wrapped module again; with ``changes``, each process keeps its own part of what became
    of them, so that nothing is sent, and only this module's weights are there twice meanwhile."""
    held = [
        (holder, key, parameter, parameter.detach().clone())
        for holder in (_managed_by(module) if changes else ())
        for key, parameter in holder._parameters.items()
        if parameter is not None
    ]
    module.reshard()
    for holder, key, parameter, value in held:
        into: Any = holder._parameters[key]
        if into is parameter:
            continue
        part, mine = _part(value, into), into.to_local()
        if not torch.equal(part, mine):
            mine.copy_(part)
        into.requires_grad_(parameter.requires_grad)


def _managed_by(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and what lies in it, but for what is wrapped for itself."""
    yield module
    for child in module.children():
        if not callable(getattr(child, "reshard", None)):
            yield from _managed_by(child)


def _part(value: Tensor, shard: Any) -> Tensor:
    """What of ``value``, which is whole, lies in this process where it is spread as ``shard`` is."""
    for dimension, placement in enumerate(shard.placements):
        if placement.is_shard():
            pieces = value.chunk(shard.device_mesh.size(dimension), placement.dim)
            at = shard.device_mesh.get_local_rank(dimension)
            value = pieces[at] if at < len(pieces) else value.narrow(placement.dim, 0, 0)
    return value
