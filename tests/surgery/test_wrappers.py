"""What torch wraps around an adapted model, in any nesting: names, files and results are the bare model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

import sampling
import trimtab


class Net(nn.Module):
    """``module`` is a name of its own here, which nothing may take for a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(6, 10), nn.GELU())
        self.block = nn.ModuleDict({"module": nn.Linear(10, 10)})
        self.last = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        block = self.block["module"] if isinstance(self.block, nn.ModuleDict) else self.block
        return self.last(torch.tanh(block(self.module(x))))


def inner(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Net], nn.Module]:
    def change(net: Net) -> nn.Module:
        net.module = wrap(net.module)
        return net

    return change


def compiled(module: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    return wrapped


WRAPPERS: dict[str, Callable[[Net], nn.Module]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": DataParallel,
    "compile": compiled,
    "a compiled part": inner(compiled),
    "a checkpointed part": inner(checkpoint_wrapper),
    "DataParallel of DistributedDataParallel of a compiled one": lambda net: DataParallel(
        DistributedDataParallel(compiled(net))
    ),
    "compiled DataParallel of a compiled part": lambda net: compiled(DataParallel(inner(compiled)(net))),
}


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone; its meeting point is in memory."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def adapted(net: nn.Module, method: str = "dora") -> nn.Module:
    rank = {} if method == "full" else {"rank": 2}
    trimtab.attach(net, trimtab.Rule(match=["module.0", "block.*", "last"], method=method, **rank))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(net).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_saved_and_named_as_the_bare_one(wrapper: str, tmp_path: Path) -> None:
    net = adapted(Net())
    names = list(trimtab.trainable_parameters(net))
    weights = {name: trimtab.effective_weight(net, name) for name in ("module.0", "block.module", "last")}
    trimtab.save_adapter(net, tmp_path / "bare")
    wrapped = WRAPPERS[wrapper](net)
    assert list(trimtab.trainable_parameters(wrapped)) == names
    assert all(torch.equal(trimtab.effective_weight(wrapped, name), weight) for name, weight in weights.items())
    trimtab.save_adapter(wrapped, tmp_path / "wrapped")
    bare, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("bare", "wrapped"))
    assert bare.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in bare.items())
    described = [tmp_path / folder / "adapter_config.json" for folder in ("bare", "wrapped")]
    assert described[0].read_bytes() == described[1].read_bytes()


@pytest.mark.parametrize("wrapper", list(WRAPPERS) if sampling.everything else list(WRAPPERS)[:-1])
def test_a_wrapped_model_is_loaded_merged_and_detached_as_the_bare_one(wrapper: str, tmp_path: Path) -> None:
    base = Net()
    net = adapted(copy.deepcopy(base))
    trimtab.save_adapter(net, tmp_path)
    x = torch.randn(5, 6)
    right = net(x).detach()
    fresh = copy.deepcopy(base)
    wrapped = WRAPPERS[wrapper](fresh)
    trimtab.load_adapter(wrapped, tmp_path)
    assert torch.allclose(wrapped(x), right, atol=1e-6)
    trimtab.load_adapter(wrapped, tmp_path)  # onto the adapters that are there by now
    with trimtab.disable_adapter(wrapped):
        assert torch.equal(wrapped(x), base(x))
    again = copy.deepcopy(base)
    other = WRAPPERS[wrapper](again)
    trimtab.load_adapter(other, tmp_path)
    trimtab.detach(other)
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert torch.equal(other(x), base(x))
    trimtab.merge(wrapped)
    assert torch.allclose(wrapped(x), right, atol=1e-6)
    assert all(parameter.requires_grad for parameter in wrapped.parameters())


@pytest.mark.parametrize("method", ["dora", "mora", "full"])
def test_a_sharded_model_is_saved_loaded_and_merged_as_the_bare_one(method: str, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))

    def sharded(net: Net) -> Net:
        fully_shard(net.module, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    base = Net()
    net = adapted(copy.deepcopy(base), method)
    x = torch.randn(5, 6)
    right, names = net(x).detach(), list(trimtab.trainable_parameters(net))
    weight = trimtab.effective_weight(net, "module.0").clone()
    sharded(net)
    assert list(trimtab.trainable_parameters(net)) == names
    assert torch.equal(trimtab.effective_weight(net, "module.0"), weight)
    trimtab.save_adapter(net, tmp_path)
    plain, fresh, other = copy.deepcopy(base), sharded(copy.deepcopy(base)), adapted(copy.deepcopy(base), method)
    for model in (plain, fresh, sharded(other)):
        trimtab.load_adapter(model, tmp_path)
        assert torch.equal(model(x), right)
        assert list(trimtab.trainable_parameters(model)) == names
    with trimtab.disable_adapter(net):
        assert torch.equal(net(x), base(x))
    trimtab.merge(net)
    assert torch.allclose(net(x), right, atol=1e-6)
    assert isinstance(net.module[0].weight, DTensor)
    trimtab.detach(fresh)
    assert torch.equal(fresh(x), base(x))


def test_rules_name_the_modules_of_the_bare_model(tmp_path: Path) -> None:
    wrapped = adapted(DataParallel(Net()))
    trimtab.save_adapter(wrapped, tmp_path)
    assert "base_model.model.module.0.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")


def test_adapters_that_come_too_late_for_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimtab.save_adapter(adapted(Net()), tmp_path)
    bare, early = DistributedDataParallel(Net()), DistributedDataParallel(adapted(Net()))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(trimtab.SurgeryError, match=r"has taken the model already.*Attach first"):
        trimtab.attach(bare, trimtab.Rule(match="last", method="lora", rank=2))
    with pytest.raises(trimtab.AdapterError, match=r"has taken the model already.*Load the adapter first"):
        trimtab.load_adapter(bare, tmp_path)
    trimtab.load_adapter(early, tmp_path)


def test_weights_that_deepspeed_has_spread_are_refused_in_words() -> None:
    """ZeRO-3 marks its parameters so; that a backward pass finds no weight there was seen with DeepSpeed 0.19.8."""
    net, late = adapted(Net()), Net()
    for model in (net, late):
        for parameter in model.parameters():
            parameter.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(trimtab.SurgeryError, match=r"by DeepSpeed \(ZeRO-3\).*fully_shard"):
        net(torch.ones(1, 6))
    with pytest.raises(trimtab.SurgeryError, match=r"by DeepSpeed \(ZeRO-3\)"):
        trimtab.attach(late, trimtab.Rule(match="last", method="dora", rank=2))
