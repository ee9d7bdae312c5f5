"""What torch puts around a model: data parallelism, sharding, compilation, checkpointing. None of it changes the names
that the model's own parts have."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

# The class that wraps -> the attribute that holds what is wrapped. By name: most programs need none of these modules.
_HELD_IN = {
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): "_checkpoint_wrapped_module",
}


_ATTRIBUTES: dict[type, str | None] = {}  # what was found so far: every module is asked, and there are few classes


def _attribute(kind: type) -> str | None:
    """The attribute in which a wrapper of this class holds its module; None for a class that wraps nothing."""
    if kind not in _ATTRIBUTES:
        places = ((parent.__module__, parent.__name__) for parent in kind.__mro__)
        _ATTRIBUTES[kind] = next((_HELD_IN[place] for place in places if place in _HELD_IN), None)
    return _ATTRIBUTES[kind]


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
    return "fully_shard" if sharded_modules(model) else None


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules in ``model`` that FSDP2 (``fully_shard``) was called for."""
    return [module for module in model.modules() if callable(getattr(module, "reshard", None))]


def without_wrappers(model: nn.Module, name: str) -> str:
    """``name``, of a module or a parameter of ``model``, as it is where nothing inside ``model`` is wrapped."""
    kept = []
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None or part != _attribute(type(module)):
            kept.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join(kept)
