"""What others hang on a frozen layer: torch's hooks, and accelerate's, which keep weights elsewhere."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import trimtab

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2},
    "dora": {"method": "dora", "rank": 2},
    "mora of magnitudes": {"method": "mora", "rank": 2, "magnitude": True},
    "full": {"method": "full"},
    "full of magnitudes": {"method": "full", "magnitude": True},
}
every_method = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), Conv1D(7, 10), nn.Tanh(), nn.Linear(7, 4, bias=False))


def attach(model: nn.Module, options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    trimtab.attach(model, trimtab.Rule(match="*", **options))


def move(model: nn.Module) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    trained = trimtab.trainable_parameters(model)
    for parameter in trained.values():
        parameter.grad = None
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


@every_method
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_and_change_what_the_layer_with_its_adapter_does(options: dict[str, Any], when: str) -> None:
    model = network()
    layer: Any = model[0]
    seen: list[Any] = []

    def hang() -> None:
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        layer.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output)))
        layer.register_forward_hook(lambda module, args, kwargs, output: output + 1, with_kwargs=True)

    if when == "before":
        hang()
    attach(model, options)
    if when == "after":
        hang()
    x = torch.randn(5, 6)
    for _ in range(2):
        got = model[0](x)
        ((module, given, output),) = seen
        assert module is layer, "the hook is given the layer that it was put on"
        assert torch.equal(given, 2 * x)
        assert torch.equal(got, output + 1)
        weight = trimtab.effective_weight(model, "0")
        bias = model[0].bias
        assert torch.allclose(output, nn.functional.linear(2 * x, weight, bias), atol=1e-5)
        seen.clear()
        move(model)
    assert "forward" not in vars(layer)
    trimtab.detach(model)
    model(x)
    assert len(seen) == 1, "it is still there afterwards"


def test_a_hook_that_is_always_called_is_called_when_the_pass_fails() -> None:
    model = network()
    attach(model, OPTIONS["lora"])
    seen: list[Any] = []
    model[0].base.register_forward_hook(lambda *_: seen.append(1), always_call=True)
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 7))
    assert seen == [1]
    model(torch.randn(5, 6))
    assert seen == [1, 1]


def test_hooks_of_the_backward_pass_are_called() -> None:
    model = network()
    attach(model, OPTIONS["dora"])
    seen: list[Any] = []
    model[2].base.register_full_backward_hook(lambda module, into, out: seen.append((into[0].shape, out[0].shape)))
    model[2].base.register_full_backward_pre_hook(lambda module, out: (2 * out[0],))
    x = torch.randn(5, 6)
    plain = network()
    attach(plain, OPTIONS["dora"])
    want, got = gradients(plain, x), gradients(model, x)
    assert seen == [((5, 10), (5, 7))]
    assert torch.allclose(got["2.adapter.B"], 2 * want["2.adapter.B"], atol=1e-6)
    assert torch.allclose(got["4.adapter.B"], want["4.adapter.B"], atol=1e-6)


def test_a_hook_that_is_removed_costs_and_does_nothing() -> None:
    model = network()
    attach(model, OPTIONS["lora"])
    x = torch.randn(5, 6)
    want = model(x)
    handle = model[0].base.register_forward_hook(lambda module, args, output: output * 0)
    assert not torch.equal(model(x), want)
    handle.remove()
    assert torch.equal(model(x), want)


def test_threads_may_call_one_layer_with_hooks_at_once() -> None:
    model = network()
    attach(model, OPTIONS["dora"])
    move(model)
    model[0].base.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(5, 6)
    with torch.no_grad():
        want, wrong = model(x), []

    def work() -> None:
        with torch.no_grad():
            for _ in range(100):
                if not torch.allclose(model(x), want, atol=1e-6):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "forward" not in vars(model[0].base)


def test_hooks_run_while_the_adapters_are_off() -> None:
    model = network()
    x = torch.randn(5, 6)
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    want = model(x)
    attach(model, OPTIONS["dora"])
    move(model)
    with trimtab.disable_adapter(model):
        assert torch.equal(model(x), want)


def test_hooks_run_in_a_compiled_model() -> None:
    model = network()
    attach(model, OPTIONS["lora"])
    move(model)
    model[0].base.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(5, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    assert "forward" not in vars(model[0].base)


def to_memory(model: nn.Module, place: Path) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model: nn.Module, place: Path) -> None:
    disk_offload(model, str(place), execution_device=torch.device("cpu"))


def by_a_map(model: nn.Module, place: Path) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("2.")}
    dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "disk", "3": "cpu", "4": "cpu"}, "cpu", state, str(place))


WAYS: dict[str, Callable[[nn.Module, Path], None]] = {"memory": to_memory, "disk": to_disk, "a map": by_a_map}


@every_method
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_whose_weights_are_kept_elsewhere_trains_as_any_other(
    options: dict[str, Any], way: Callable[[nn.Module, Path], None], when: str, tmp_path: Path
) -> None:
    plain, model, x = network(), network(), torch.randn(5, 6)
    attach(plain, options)
    if when == "before":
        way(model, tmp_path / "weights")
    attach(model, options)
    trained = trimtab.trainable_parameters(model)
    if when == "after":
        way(model, tmp_path / "weights")
    assert {id(one) for one in trimtab.trainable_parameters(model).values()} == {id(one) for one in trained.values()}
    assert not any(one.is_meta for one in trained.values()), "what trains is never kept elsewhere"
    move(plain), move(model)
    for _ in range(2):
        assert torch.allclose(model(x), plain(x), atol=1e-6)
        want, got = gradients(plain, x), gradients(model, x)
        assert got.keys() == want.keys() == trained.keys()
        for name in want:
            assert torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-5), name
        move(plain), move(model)
    with torch.no_grad():
        assert torch.allclose(model(x), plain(x), atol=1e-5)
        assert torch.allclose(model(x), plain(x), atol=1e-5)
    for name in ("0", "2", "4"):
        want_weight = trimtab.effective_weight(plain, name)
        assert torch.allclose(trimtab.effective_weight(model, name), want_weight, atol=1e-6)
    if options["method"] != "full":
        assert torch.allclose(nn.functional.linear(x, model[0].weight, model[0].bias), plain[0](x), atol=1e-5)
        assert model[0].base.weight.is_meta or way is by_a_map, "it is kept elsewhere again"
    trimtab.save_adapter(model, tmp_path / "adapter")
    other = network()
    trimtab.load_adapter(other, tmp_path / "adapter")
    assert torch.allclose(other(x), plain(x), atol=1e-5)
    again = network()
    way(again, tmp_path / "again")
    trimtab.load_adapter(again, tmp_path / "adapter")
    assert torch.allclose(again(x), plain(x), atol=1e-5)


@every_method
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_merge_reaches_weights_in_memory(options: dict[str, Any], when: str, tmp_path: Path) -> None:
    model, x = network(), torch.randn(5, 6)
    if when == "before":
        to_memory(model, tmp_path)
    attach(model, options)
    if when == "after":
        to_memory(model, tmp_path)
    move(model)
    want = model(x).detach()
    report = trimtab.merge(model)
    assert set(report.modules) == {"0", "2", "4"}
    assert report.rounding < 1e-6
    for _ in range(2):
        assert torch.allclose(model(x), want, atol=1e-5)


def test_a_merge_onto_weights_on_a_disk_is_refused_in_words(tmp_path: Path) -> None:
    model, x = network(), torch.randn(5, 6)
    to_disk(model, tmp_path)
    attach(model, OPTIONS["dora"])
    move(model)
    want = model(x).detach()
    with pytest.raises(trimtab.SurgeryError, match="kept on a disk by accelerate, and what is there is not changed"):
        trimtab.merge(model)
    assert torch.equal(model(x), want), "nothing was changed"
    trimtab.detach(model)


def test_a_copy_of_a_model_with_hooks_calls_its_own_layers() -> None:
    model = network()
    attach(model, OPTIONS["dora"])
    model[0].base.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(5, 6)
    other = copy.deepcopy(model)
    want = model(x).detach()
    move(other)
    assert not torch.allclose(other(x), want)
    assert torch.equal(model(x), want)


def test_a_whole_module_that_is_kept_elsewhere_trains_its_own_tensors(tmp_path: Path) -> None:
    plain, model = nn.Sequential(nn.LayerNorm(6)), nn.Sequential(nn.LayerNorm(6))
    to_memory(model, tmp_path)
    for one in (plain, model):
        attach(one, {"method": "full"})
        move(one)
    assert not any(parameter.is_meta for parameter in trimtab.trainable_parameters(model).values())
    x = torch.randn(5, 6)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(trimtab.effective_weight(model, "0"), trimtab.effective_weight(plain, "0"))
