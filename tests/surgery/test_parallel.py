"""Adapted models under PyTorch's own wrappers for several processes: here a group of one, which has all their hooks."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import trimtab

PLANS = {
    "lora": [trimtab.Rule(match="*", method="lora", rank=2)],
    "dora": [trimtab.Rule(match="*", method="dora", rank=2)],
    "mora with magnitude": [trimtab.Rule(match="*", method="mora", rank=2, magnitude=True)],
    "a mix": [trimtab.Rule(match="*", method="dora", rank=2), trimtab.Rule(match="1", method="mora", rank=2)],
    "blocks": [trimtab.Rule(match="*", method="lora", rank=2), trimtab.Rule(match="0", method="serial", bottleneck=3)],
}


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone; its meeting point is in memory."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(params=PLANS, ids=str)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Sequential(nn.Linear(12, 16), nn.Tanh()), nn.Linear(16, 8))
    trimtab.attach(layers, trimtab.Plan(PLANS[request.param]))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(layers).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layers


def steps(model: nn.Module, count: int = 3) -> list[Tensor]:
    """The losses of ``count`` steps of SGD."""
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(count):
        loss = model(torch.randn(5, 12, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def test_data_parallel_training_is_the_same(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    assert steps(DistributedDataParallel(model)) == steps(plain)
    for name, parameter in trimtab.trainable_parameters(model).items():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_fully_sharded_training_is_the_same(model: nn.Module) -> None:
    """Each part gathered before its call and sharded again after it, as FSDP2's hooks do."""
    plain = copy.deepcopy(model)
    for part in (model[0], model[1]):  # type: ignore[index]
        fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    assert steps(model) == steps(plain)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), plain.get_parameter(name)), name  # type: ignore[attr-defined]
