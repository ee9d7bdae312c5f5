"""Several adapters on one model: each computes, trains, saves and merges as if it were alone there."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from adapted_models import change
from named_adapters import PLANS, Every, attached, ids, rule, together_and_alone

NAMES = list(PLANS)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(3)
    return Every().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def made(base: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    return together_and_alone(base)


@pytest.fixture
def model(made: tuple[nn.Module, dict[str, nn.Module]]) -> nn.Module:
    return copy.deepcopy(made[0])


@pytest.fixture
def alone(made: tuple[nn.Module, dict[str, nn.Module]]) -> dict[str, nn.Module]:
    return made[1]


def output(model: nn.Module, rows: int = 4) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids(rows))
    return result


def test_the_names_are_listed_in_the_order_in_which_they_came(model: nn.Module, base: nn.Module) -> None:
    assert trimtab.adapters(model) == NAMES
    assert trimtab.active_adapter(model) == NAMES[-1], "the one that came last"
    assert trimtab.adapters(base) == []
    assert trimtab.active_adapter(base) is None
    trimtab.delete_adapter(model, NAMES[0])
    attached(model, NAMES[0])
    assert trimtab.adapters(model) == [*NAMES[1:], NAMES[0]]
    assert trimtab.adapters(copy.deepcopy(model)) == [*NAMES[1:], NAMES[0]]


@pytest.mark.parametrize("name", NAMES)
def test_each_computes_as_if_it_were_alone(name: str, model: nn.Module, alone: dict[str, nn.Module]) -> None:
    trimtab.set_adapter(model, name)
    assert trimtab.active_adapter(model) == name
    assert torch.equal(output(model), output(alone[name]))
    got, want = gradients(model), gradients(copy.deepcopy(alone[name]))
    assert got.keys() == want.keys()
    for key, gradient in want.items():
        assert torch.equal(got[key], gradient), key


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By names without what another adapter puts around a module."""
    model(ids()).square().mean().backward()
    found = {key.replace(".base", ""): one.grad for key, one in trimtab.trainable_parameters(model).items()}
    assert all(gradient is not None for gradient in found.values())
    return {key: gradient for key, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("quantised", ["", "nf4", "int8"])
def test_without_an_adapter_it_is_the_bare_model_bit_for_bit(quantised: str) -> None:
    torch.manual_seed(4)
    bare = Every(quantised).eval().requires_grad_(False)
    model = copy.deepcopy(bare)
    for name in NAMES:
        attached(model, name)
    want, before = output(bare), output(model)
    with trimtab.disable_adapter(model):
        assert trimtab.active_adapter(model) == NAMES[-1]
        assert torch.equal(output(model), want)
        trimtab.set_adapter(model, NAMES[0])
        assert torch.equal(output(model), want), "it is a context, and no choice"
    trimtab.set_adapter(model, None)
    assert trimtab.active_adapter(model) is None
    assert trimtab.trainable_parameters(model) == {}
    assert torch.equal(output(model), want)
    trimtab.set_adapter(model, NAMES[-1])
    assert torch.equal(output(model), before)
    assert not torch.equal(before, want)


def test_the_others_stay_as_they_are_while_one_is_trained(model: nn.Module) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trimtab.set_adapter(model, "v1.5 (fr)")
    trained = trimtab.trainable_parameters(model)
    assert all(".adapter_v1%2E5%20%28fr%29." in key for key in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model(ids()).square().mean().backward()
    optimizer.step()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if ".adapter_v1%2E5%20%28fr%29." in key}


def test_what_was_frozen_by_hand_in_an_adapter_stays_frozen(model: nn.Module) -> None:
    trimtab.set_adapter(model, "legal")
    for key, parameter in trimtab.trainable_parameters(model).items():
        parameter.requires_grad_(not key.endswith(".A"))
    left = set(trimtab.trainable_parameters(model))
    trimtab.set_adapter(model, "default")
    assert not left & set(trimtab.trainable_parameters(model))
    trimtab.set_adapter(model, "legal")
    assert set(trimtab.trainable_parameters(model)) == left


def test_adapters_that_are_not_active_keep_nothing_beside_their_tensors() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    for name in ("a", "b", "c"):
        trimtab.attach(net, rule("0", "dora", rank=2), name=name)
    with torch.no_grad():
        for name in ("a", "b", "c"):
            trimtab.set_adapter(net, name)
            net(torch.randn(2, 64))
        with trimtab.per_row(net, ["a", "b", "c", None]):
            net(torch.randn(4, 64))
    resting: list[Any] = [net[0].adapter_of(name) for name in ("a", "b")]
    assert all(one._kept is None and one.squares is None and one._few_tokens is None for one in resting)


def test_a_switch_copies_nothing(model: nn.Module) -> None:
    places = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    parameters = {key: id(one) for key, one in model.named_parameters()}
    for name in (*NAMES, None, NAMES[0]):
        trimtab.set_adapter(model, name)
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == places
    assert {key: id(one) for key, one in model.named_parameters()} == parameters


@pytest.mark.parametrize("name", NAMES)
def test_each_is_saved_and_loaded_by_name(
    name: str, model: nn.Module, base: nn.Module, alone: dict[str, nn.Module], tmp_path: Path
) -> None:
    other = next(one for one in NAMES if one != name)
    trimtab.set_adapter(model, other)
    trimtab.save_adapter(model, tmp_path / "by name", name)
    trimtab.save_adapter(alone[name], tmp_path / "alone")
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "by name").iterdir()} == files
    trimtab.save_adapter(model, tmp_path / "active")
    fresh = copy.deepcopy(base)
    report = trimtab.load_adapter(fresh, tmp_path / "active", name="first")
    again = trimtab.load_adapter(fresh, tmp_path / "by name", name="second")
    assert again.total_parameters == report.total_parameters == sum(one.numel() for one in base.parameters())
    assert trimtab.adapters(fresh) == ["first", "second"]
    assert trimtab.active_adapter(fresh) == "second"
    assert torch.equal(output(fresh), output(alone[name]))
    trimtab.set_adapter(fresh, "first")
    assert torch.equal(output(fresh), output(alone[other]))
    # Values that are loaded under a name that is there go to that one, and it is active then.
    trimtab.set_adapter(fresh, "second")
    change(fresh)
    trimtab.set_adapter(fresh, "first")
    trimtab.load_adapter(fresh, tmp_path / "by name", name="second")
    assert trimtab.active_adapter(fresh) == "second"
    assert torch.equal(output(fresh), output(alone[name]))


@pytest.mark.parametrize("name", ["legal", "v1.5 (fr)", "whole"])
def test_a_merge_folds_the_active_one_in_and_drops_the_others(
    name: str, model: nn.Module, alone: dict[str, nn.Module]
) -> None:
    one = copy.deepcopy(alone[name])
    trimtab.set_adapter(model, name)
    assert trimtab.merge(model) == trimtab.merge(one)
    assert torch.equal(output(model), output(one))
    assert model.state_dict().keys() == one.state_dict().keys()
    assert trimtab.adapters(model) == []


def test_a_merge_that_is_refused_keeps_all(model: nn.Module) -> None:
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trimtab.set_adapter(model, "default")
    with pytest.raises(trimtab.SurgeryError, match="sit on blocks"):
        trimtab.merge(model)
    trimtab.set_adapter(model, None)
    with pytest.raises(trimtab.SurgeryError, match=r"no adapter is active; the model carries 'legal', .*set_adapter"):
        trimtab.merge(model)
    assert trimtab.adapters(model) == NAMES
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_detach_removes_all(model: nn.Module, base: nn.Module) -> None:
    trimtab.detach(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert torch.equal(output(model), output(base))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], [NAMES[2], NAMES[0], NAMES[3], NAMES[1]]], ids=str)
def test_deleting_leaves_the_others(
    order: list[str], model: nn.Module, base: nn.Module, alone: dict[str, nn.Module]
) -> None:
    left = list(NAMES)
    for name in order:
        active = trimtab.active_adapter(model)
        trimtab.delete_adapter(model, name)
        left.remove(name)
        assert trimtab.adapters(model) == left
        assert trimtab.active_adapter(model) == (None if active in (name, None) else active)
        for other in left:
            trimtab.set_adapter(model, other)
            assert torch.equal(output(model), output(alone[other]))
        if left:
            trimtab.set_adapter(model, None)
            assert torch.equal(output(model), output(base))
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]


def test_deleting_the_last_gives_back_what_was_trainable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False))
    for name in ("a", "b"):
        trimtab.attach(model, rule("1", "lora", rank=1), name=name)
    for name in ("b", "a"):
        trimtab.delete_adapter(model, name)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    again: nn.Module = pickle.loads(pickle.dumps(model))
    return again


def loaded(model: nn.Module) -> nn.Module:
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(model.state_dict())
    return again


@pytest.mark.parametrize("copies", [copied, pickled, loaded])
def test_copies_have_all_of_them(
    copies: Callable[[nn.Module], nn.Module], model: nn.Module, base: nn.Module, alone: dict[str, nn.Module]
) -> None:
    again = copies(model)
    for name in NAMES:
        trimtab.set_adapter(again, name)
        assert torch.equal(output(again), output(alone[name]))
    assert trimtab.active_adapter(model) == NAMES[-1]
    assert torch.equal(output(model), output(alone[NAMES[-1]])), "the first is not switched with its copy"
    trimtab.detach(again)
    assert torch.equal(output(again), output(base))
    assert torch.equal(output(model), output(alone[NAMES[-1]]))


def test_they_follow_the_model_to_another_dtype(model: nn.Module, alone: dict[str, nn.Module]) -> None:
    model.to(torch.float64)
    for name in NAMES:
        trimtab.set_adapter(model, name)
        assert torch.equal(output(model), output(copy.deepcopy(alone[name]).to(torch.float64)))


def test_they_follow_the_model_into_another_mode(model: nn.Module) -> None:
    model.train()
    trimtab.set_adapter(model, "legal")
    assert all(module.training for module in model.modules())
    model.eval()
    trimtab.set_adapter(model, "default")
    assert not any(module.training for module in model.modules())


def test_compiled_code_follows_the_switch() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    for name, method in (("a", "dora"), ("b", "mora")):
        trimtab.attach(net, rule("*", method, rank=2), name=name)
        change(net)
    x = torch.randn(3, 8)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        for name in ("a", None, "b", "a"):
            trimtab.set_adapter(compiled, name)
            assert torch.allclose(compiled(x), net(x), atol=1e-6)
        with trimtab.disable_adapter(compiled):
            assert torch.equal(compiled(x), net(x))


def test_a_vocabulary_grows_under_all_of_them() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes)).eval()
    plans = {"a": rule(["lm_head", "*.embed_tokens"], "dora", rank=2), "b": rule("lm_head", "full")}
    for name, plan in plans.items():
        torch.manual_seed(1)
        trimtab.attach(model, plan, name=name)
        change(model)
    words = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        before = {name: (trimtab.set_adapter(model, name), model(words).logits)[1] for name in plans}
        model.resize_token_embeddings(15, mean_resizing=False)
        for name in plans:
            trimtab.set_adapter(model, name)
            after = model(words).logits
            assert after.shape[-1] == 15
            assert torch.allclose(after[..., :12], before[name], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: trimtab.set_adapter(net, "legl"), r"no adapter 'legl', but 'legal'\. Did you mean 'legal'\?"),
        (
            lambda net: trimtab.delete_adapter(net, "x"),
            r"delete_adapter: the model carries no adapter 'x', but 'legal'",
        ),
        (lambda net: trimtab.save_adapter(net, "nowhere", "x"), r"save_adapter: the model carries no adapter 'x'"),
        (lambda net: trimtab.attach(net, rule("0", "lora"), name="legal"), r"under the name 'legal'.*another name"),
        (lambda net: trimtab.attach(net, rule("0", "lora"), name=""), r"the name of an adapter.*got ''"),
        (lambda net: trimtab.attach(net, rule("0", "lora"), name=" a"), r"without a space at either end, got ' a'"),
        (lambda net: trimtab.attach(net, rule("0", "lora"), name="a\n"), r"printable"),
    ],
)
def test_a_name_that_cannot_be_is_refused(call: Callable[[nn.Module], object], message: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    trimtab.attach(net, rule("0", "lora", rank=1), name="legal")
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(trimtab.SurgeryError, match=message):
        call(net)
    assert net.state_dict().keys() == state.keys()
    assert trimtab.active_adapter(net) == "legal"


def test_a_model_without_adapters_has_none_to_switch_to() -> None:
    for call in (lambda net: trimtab.set_adapter(net, None), lambda net: trimtab.delete_adapter(net, "a")):
        with pytest.raises(trimtab.SurgeryError, match="no adapters; attach some first"):
            call(nn.Sequential(nn.Linear(2, 2)))


def test_with_none_active_there_is_none_to_save(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    trimtab.attach(net, rule("0", "lora", rank=1), name="legal")
    trimtab.set_adapter(net, None)
    with pytest.raises(trimtab.SurgeryError, match=r"no adapter is active; the model carries 'legal'\. Name one"):
        trimtab.save_adapter(net, tmp_path)
    trimtab.save_adapter(net, tmp_path, name="legal")


def test_one_more_adapter_would_freeze_what_was_unfrozen_by_hand() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    trimtab.attach(net, rule("0", "lora", rank=1), name="a")
    net[1].requires_grad_(True)
    with pytest.raises(trimtab.SurgeryError, match=r"2 tensors outside .* such as 1\.weight.*rule of method full"):
        trimtab.attach(net, rule("0", "lora", rank=1), name="b")
    assert trimtab.adapters(net) == ["a"]


def test_a_folder_that_does_not_fit_leaves_all_as_it_was(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(8, 12))
    trimtab.attach(wide, rule("0", "dora", rank=2))
    trimtab.save_adapter(wide, tmp_path / "wide")
    net = nn.Sequential(nn.Linear(8, 8))
    trimtab.attach(net, rule("0", "lora", rank=1), name="a")
    trained = set(trimtab.trainable_parameters(net))
    with pytest.raises(trimtab.AdapterError, match="another model"):
        trimtab.load_adapter(net, tmp_path / "wide", name="b")
    assert trimtab.adapters(net) == ["a"]
    assert trimtab.active_adapter(net) == "a"
    assert set(trimtab.trainable_parameters(net)) == trained


def test_parts_that_were_switched_apart_have_no_one_name() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    for name in ("a", "b"):
        trimtab.attach(net, rule("*", "lora", rank=1), name=name)
    trimtab.set_adapter(net[0], "a")
    assert trimtab.active_adapter(net[0]) == "a"
    with pytest.raises(trimtab.SurgeryError, match=r"different active adapters \('.', '.'\)"):
        trimtab.active_adapter(net)
    trimtab.set_adapter(net, "b")
    assert trimtab.active_adapter(net) == "b"


def test_statistics_are_saved_with_each_that_was_trained_since(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fresh = copy.deepcopy(net)
    trimtab.attach(net, rule("0", "lora", rank=1), name="a")
    net(torch.randn(9, 4) + 3)
    trimtab.attach(net, rule("0", "lora", rank=1), name="b")
    trimtab.save_adapter(net, tmp_path, name="a")
    trimtab.load_adapter(fresh, tmp_path)
    x = torch.randn(2, 4)
    trimtab.set_adapter(net, "a")
    assert torch.equal(fresh.eval()(x), net.eval()(x))


_TRAINS = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import trimtab
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
for name, method in (("a", "dora"), ("b", "lora")):
    trimtab.attach(net, trimtab.Rule(match="*", method=method, rank=2), name=name)
trimtab.set_adapter(net, "a")
before = {key: one.clone() for key, one in net.state_dict().items()}
model = DistributedDataParallel(net)
try:
    trimtab.set_adapter(model, "b")
    raise SystemExit("not refused")
except trimtab.SurgeryError as error:
    assert "DistributedDataParallel has taken the model" in str(error), error
optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
for _ in range(2):
    model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
trimtab.set_adapter(model.module, "b")
with torch.no_grad():
    other = model(x)
trimtab.set_adapter(model.module, "a")
changed = [key for key, one in net.state_dict().items() if not torch.equal(one, before[key])]
assert changed and all(".adapter_a." in key for key in changed), changed
every = [torch.zeros_like(other) for _ in range(2)]
for output in (model(x).detach(), other):
    dist.all_gather(every, output)
    assert torch.equal(*every)
torch.save(model(x).detach(), sys.argv[3]) if rank == 0 else None
"""


@pytest.mark.full
def test_two_processes_train_one_of_them_alike(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "meeting"), str(tmp_path / "output")]
    running = [
        subprocess.Popen([sys.executable, "-c", _TRAINS, str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    trimtab.attach(net, rule("*", "dora", rank=2))
    optimizer = torch.optim.SGD(trimtab.trainable_parameters(net).values(), lr=0.1)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(net(x), torch.load(tmp_path / "output", weights_only=True), atol=1e-6)
