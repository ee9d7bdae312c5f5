"""Weights that accelerate keeps elsewhere (in a processor's memory, on a disk) and fetches when their module is called.

Between two calls such a module holds tensors on the meta device, and accelerate's hook on it knows where their numbers
are. What trains is never kept elsewhere: what is fetched is a copy, and its gradient would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import SurgeryError
from trimtab.ops import spread


def hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on ``module`` that keep its tensors elsewhere."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False):
            yield one


def fetched(module: nn.Module, name: str, held: Tensor) -> Tensor:
    """The tensor ``name`` of ``module`` with its numbers, on the device where the module computes; ``held`` itself,
    which is on the meta device, if it has none anywhere."""
    for hook in hooks(module):
        value: Tensor = hook.weights_map[name]
        return value.detach().to(held.device if hook.execution_device is None else hook.execution_device)
    return held


def device_of(module: nn.Module, held: Tensor) -> torch.device:
    """Where ``module`` computes with its tensor ``held``."""
    devices = [hook.execution_device for hook in hooks(module)] if held.is_meta else []
    return torch.device(devices[0]) if devices and devices[0] is not None else held.device


def write(module: nn.Module, name: str, held: Tensor, value: Tensor) -> None:
    """Write ``value`` to ``held``, the tensor ``name`` of ``module``, or to the place where its numbers are kept.

    Raises SurgeryError if that place is a disk.
    """
    if not held.is_meta:
        spread.write(held, value)
        return
    for hook in hooks(module):
        kept, key = hook.weights_map, name
        while hasattr(kept, "dataset"):  # several modules share one, each with a prefix of its own
            kept, key = kept.dataset, f"{kept.prefix}{key}"
        kept = getattr(kept, "state_dict", kept)
        if not isinstance(kept, dict) or key not in kept:
            raise SurgeryError(
                f"the weight of a {type(module).__name__} is kept on a disk by accelerate, and what is there is not "
                "changed. Load the model without offloading, or offloaded to memory (cpu_offload), then load the "
                "adapter onto it and merge"
            )
        kept[key] = value.to(kept[key].device, kept[key].dtype)


def stay(module: nn.Module, own: dict[str, nn.Parameter | None] | None = None) -> None:
    """Take the tensors that hang on ``module`` itself back from where accelerate keeps them, for good.

    ``own``: the parameters that it held before; else it gets new ones.
    """
    for hook in hooks(module):
        names = [*module._parameters, *module._buffers]
        if own is None:
            hook.detach_hook(module)
        else:
            module._parameters.update(own)
        hook.offload = False
        for name in names:
            tensor = module._parameters.get(name, module._buffers.get(name))
            if tensor is not None and hook.execution_device is not None:
                tensor.data = tensor.data.to(hook.execution_device)
