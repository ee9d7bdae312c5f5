"""Models that FSDP2 (``fully_shard``) has spread over several processes, and what is changed of them afterwards.

FSDP2 knows the parameters that were there when it was called. Adapters that come later are whole in every process: they
start with the values of the first one, and their gradients are averaged when a backward pass ends, as FSDP2 averages
those of the parameters that it knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules.batchnorm import _NormBase

from trimtab.errors import SurgeryError, TrimtabError
from trimtab.methods import Method
from trimtab.ops.spread import is_spread, whole
from trimtab.processes import sum_gradients
from trimtab.surgery.wrappers import sharded_modules, synchronised_by, without_wrappers


def put_away(model: nn.Module) -> bool:
    """Shard again what FSDP2 has left whole behind a pass, and give whether it has sharded anything of ``model``.

    Where something of a model is read or changed outside of a pass, this comes first: what was written into a weight
    that is whole for a while would be lost."""
    sharded = sharded_modules(model)
    for module in sharded:
        module.reshard()
    return bool(sharded)


def _split_by_plan(model: nn.Module) -> bool:
    """Whether weights of ``model`` lie in parts in several processes by a tensor-parallel plan (``tp_plan``): as
    DTensors that nothing gathers before they are used, or that FSDP2 gathers to such."""
    by_fsdp = {id(parameter) for module in sharded_modules(model) for parameter in module.parameters()}
    return any(id(one) not in by_fsdp or sum(at.is_shard() for at in one.placements) > 1 for one in _spread_of(model))


def require_open(model: nn.Module, place: str, begin: str, error: type[TrimtabError]) -> None:
    """Raise ``error``, which names the ``place``, for a model that cannot take new adapters any more; ``begin``: what
    should have come first."""
    if (wrapper := synchronised_by(model)) not in (None, "fully_shard"):
        raise error(
            f"{place}: {wrapper} has taken the model already, and would not keep new adapters alike in all processes. "
            f"{begin} first, and call {wrapper} then"
        )
    if _split_by_plan(model):
        raise error(
            f"{place}: the model's weights are split over several processes by a tensor-parallel plan, which an "
            "adapter does not follow. Load the model without tp_plan, and shard it with fully_shard (FSDP2)"
        )


def _spread_of(model: nn.Module) -> list[Any]:
    """The parameters of ``model`` of which this process holds no more than a part."""
    return [parameter for parameter in model.parameters() if is_spread(parameter)]


def require_same_mesh(model: nn.Module, verb: str) -> None:
    """Raise SurgeryError if new adapters on ``model`` could not be kept alike in all processes that train it."""
    spread = _spread_of(model)
    if any(one.is_meta for one in spread):
        raise SurgeryError(
            f"{verb}: the model is sharded, and its weights are on the meta device, without numbers. Load them first"
        )
    if any(one.device.type != one.device_mesh.device_type for one in spread):
        raise SurgeryError(
            f"{verb}: the model is sharded, and its weights are kept on the processor between passes (CPUOffloadPolicy)"
            ", where an adapter cannot be made of them. Attach first, and call fully_shard then"
        )
    if len({one.device_mesh for one in spread}) > 1:
        raise SurgeryError(
            f"{verb}: the model's weights are spread over different groups of processes (expert parallelism), which "
            "new adapters do not follow. Load the model with one mesh for all of it"
        )


def keep_alike(model: nn.Module, adapters: Iterable[nn.Module]) -> None:
    """Keep the parameters of ``adapters``, which are new in ``model``, alike in the processes that it is sharded over.
    What is frozen or trained of it from now on is so in its passes, too."""
    if synchronised_by(model) != "fully_shard":
        return
    mesh = _spread_of(model)[0].device_mesh
    parameters = list({id(one): one for adapter in adapters for one in adapter.parameters()}.values())
    groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    with torch.no_grad():
        for adapter in adapters:
            for tensor in (*adapter.parameters(), *adapter.buffers()):
                for group in groups:
                    dist.broadcast(tensor, group=group, group_src=0)
    averaging = _Averaging(parameters, groups, mesh.size())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(averaging.note)
    follow_trained(model)


class _Averaging:
    """Averages the gradients of ``parameters`` over ``groups`` of processes at the end of each backward pass.

    What earlier passes have left in a gradient is alike in all already, and so stays as it is."""

    def __init__(self, parameters: list[nn.Parameter], groups: list[Any], size: int) -> None:
        self._parameters, self._groups, self._size = parameters, groups, size
        self._due = False

    def note(self, parameter: Tensor) -> None:
        if not self._due:
            self._due = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._due = False
        trained = [one for one in self._parameters if one.requires_grad]
        sum_gradients(trained, self._total)
        for one in trained:
            if one.grad is not None:
                one.grad.div_(self._size)

    def _total(self, tensor: Tensor) -> Tensor:
        for group in self._groups:
            dist.all_reduce(tensor, group=group)
        return tensor


def follow_trained(model: nn.Module) -> None:
    """Let what FSDP2 gathers for a pass ask for gradients where the parts of it do: it notes that once, at the first
    pass, and would compute gradients of what was frozen since."""
    for module in sharded_modules(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for held in group.fsdp_params:
                if (gathered := getattr(held, "_unsharded_param", None)) is not None:
                    gathered.requires_grad_(held.sharded_param.requires_grad)


@contextmanager
def whole_tensors(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, *, kept: bool = True
) -> Iterator[None]:
    """A context in which the modules of ``model`` that train, or that count statistics, hold whole tensors where theirs
    are sharded (FSDP2's), so that what reads them need not know of it. The tensors come from ``state_dict`` where it
    has them. Else all processes gather them, and therefore must enter together; those in which they are not ``kept``
    gather each for the others, and drop it."""
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
                value = given.get(name)
                if value is None and id(parameter) not in made:
                    value = whole(parameter)
                if value is parameter or not kept:
                    continue
                if id(parameter) not in made:
                    assert value is not None
                    made[id(parameter)] = nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
                replaced.append((holder, key, parameter))
                holder._parameters[key] = made[id(parameter)]
        yield
    finally:
        for holder, key, parameter in replaced:
            holder._parameters[key] = parameter
