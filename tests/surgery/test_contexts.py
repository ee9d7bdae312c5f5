"""The promise that nothing trains: what it saves, what it means, and when it ends."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from trimtab.methods import _weight
from trimtab.surgery.contexts import evaluating


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 20))
    trimtab.attach(
        model,
        trimtab.Plan(
            [
                trimtab.Rule(match="0", method="dora", rank=2),
                trimtab.Rule(match="2", method="mora", rank=2, magnitude=True),
            ]
        ),
    )
    change(model)
    return model.eval()


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every comparison of trained tensors."""
    seen: list[object] = []
    same = _weight.same_values

    def watched(*given: object) -> bool:
        seen.append(given)
        return same(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(_weight, "same_values", watched)
    return seen


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 40).reshape(2, 20))


@pytest.mark.parametrize("context", [trimtab.for_inference, evaluating])
def test_nothing_is_compared_and_nothing_changes(
    model: nn.Module, compared: list[object], context: Callable[[nn.Module], trimtab.for_inference]
) -> None:
    outside = [output(model), output(model)]
    assert len(compared) == 2  # the second pass, once for each layer
    with context(model):
        inside = [output(model), output(model)]
    assert len(compared) == 2
    assert all(torch.equal(found, outside[0]) for found in (*outside, *inside))


def test_values_that_changed_before_it_are_seen(model: nn.Module) -> None:
    for _ in range(2):
        change(model)
        fresh = output(copy.deepcopy(model))
        with trimtab.for_inference(model):
            assert torch.equal(output(model), fresh)


def test_values_that_change_in_it_are_seen_after_it(model: nn.Module) -> None:
    with trimtab.for_inference(model), trimtab.for_inference(model):
        output(model)
        change(model)
        held = output(model)
    fresh = output(copy.deepcopy(model))
    assert torch.equal(output(model), fresh)
    assert not torch.allclose(held, fresh)


def test_the_outer_of_two_lasts(model: nn.Module, compared: list[object]) -> None:
    with trimtab.for_inference(model):
        with trimtab.for_inference(model):
            output(model)
        output(model)
    assert not compared
    output(model)
    output(model)
    assert compared


def test_it_ends_with_an_error_too(model: nn.Module, compared: list[object]) -> None:
    with pytest.raises(KeyError), trimtab.for_inference(model):
        raise KeyError
    output(model)
    output(model)
    assert compared


def test_a_copy_is_under_no_promise(model: nn.Module, compared: list[object]) -> None:
    with trimtab.for_inference(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        output(other)
        output(other)
    assert len(compared) == 4


@pytest.mark.parametrize(
    "change_of_base",
    [
        lambda layer: layer.base.weight.mul_(2),
        lambda layer: setattr(layer.base, "weight", nn.Parameter(torch.randn(20, 20), requires_grad=False)),
        lambda layer: setattr(layer.base, "bias", nn.Parameter(torch.randn(20), requires_grad=False)),
        lambda layer: layer.load_state_dict({"base.weight": torch.randn(20, 20)}, strict=False),
        lambda layer: layer.load_state_dict({"base.weight": torch.randn(20, 20)}, strict=False, assign=True),
    ],
)
@pytest.mark.parametrize(
    "context", [trimtab.for_inference, lambda one: trimtab.per_row(one, ["default", None])], ids=["held", "by rows"]
)
def test_a_frozen_weight_that_changes_in_it_is_seen(
    context: Callable[[nn.Module], Any], change_of_base: Callable[[Any], object], model: nn.Module
) -> None:
    """The promise is about what is trained."""
    with context(model):
        before = output(model)
        for layer in (model[0], model[2]):
            with torch.no_grad():
                change_of_base(layer)
        found = output(model)
    other = copy.deepcopy(model)
    with context(other):
        torch.testing.assert_close(found, output(other))
    assert not torch.allclose(found, before)


def test_a_model_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        made = nn.Sequential(nn.Linear(20, 20))
    trimtab.attach(made, trimtab.Rule(match="0", method="dora", rank=2))
    start = output(made)
    with trimtab.per_row(made, ["default", None]):
        assert torch.allclose(output(made), start, atol=1e-6)
        assert torch.allclose(output(made), start, atol=1e-6)
    with trimtab.for_inference(made):
        assert torch.allclose(output(made), start, atol=1e-6)


@pytest.mark.parametrize("context", [trimtab.disable_adapter, lambda one: trimtab.per_row(one, [None, "default"])])
def test_a_copy_is_in_no_context_of_the_model(context: Callable[[nn.Module], Any], model: nn.Module) -> None:
    start = output(model)
    with context(model):
        other = copy.deepcopy(model)
        assert not torch.allclose(output(model), start)
        assert torch.equal(output(other), start)
    assert torch.equal(output(other), start)
    with trimtab.per_row(other, ["default", None]):
        assert torch.allclose(output(other)[0], start[0], atol=1e-6)


def test_training_goes_on_as_ever(model: nn.Module) -> None:
    x = torch.randn(3, 20)
    expected = copy.deepcopy(model)
    expected(x).square().sum().backward()
    with trimtab.for_inference(model):
        output(model)
    model(x).square().sum().backward()
    wanted = trimtab.trainable_parameters(expected)
    for name, parameter in trimtab.trainable_parameters(model).items():
        assert torch.equal(parameter.grad, wanted[name].grad), name  # type: ignore[arg-type]


LAYERS = {
    "lora": {"method": "lora", "rank": 2},
    "dora": {"method": "dora", "rank": 2},
    "dora, columns": {"method": "dora", "rank": 2, "magnitude_axis": "input"},
    "magnitude alone": {"method": "lora", "rank": 0, "magnitude": True},
    "rotation": {"method": "mora", "rank": 2, "magnitude": True},
    "sharing": {"method": "mora", "rank": 2, "form": "sharing"},
}


def layer(options: dict[str, object], dtype: torch.dtype, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12, bias=bias, dtype=dtype))
    trimtab.attach(model, trimtab.Rule(match="0", **options))
    change(model)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_a_few_tokens_give_the_same_bits(name: str, dtype: torch.dtype, bias: bool) -> None:
    model = layer({**LAYERS[name], "compute": "factored"}, dtype, bias)
    with torch.no_grad():
        for shape in ((20,), (1, 1, 20), (3, 20), (2, 8, 20), (17, 20)):
            x = torch.randn(shape, dtype=dtype)
            outside = model(x)
            with trimtab.for_inference(model):
                assert all(torch.equal(model(x), outside) for _ in range(2))


@pytest.mark.parametrize("name", LAYERS)
def test_a_few_tokens_give_the_formula(name: str) -> None:
    model = layer(LAYERS[name], torch.float32, True)
    x = torch.randn(3, 20)
    exact = x @ trimtab.effective_weight(model, "0").t() + model[0].bias
    with trimtab.for_inference(model), torch.no_grad():
        torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)


def test_what_served_makes_way(model: nn.Module) -> None:
    """For gradients, for autocast, for dropout, and for another dtype, in the middle of it."""
    x = torch.randn(2, 20)
    with trimtab.for_inference(model):
        output(model)
        model(x).sum().backward()
        assert all(parameter.grad is not None for parameter in trimtab.trainable_parameters(model).values())
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert model.double()(x.double()).dtype == torch.float64
    trimtab.detach(model)
    model.float()
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2, dropout=0.5))
    change(model)
    with trimtab.for_inference(model), torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_a_weight_that_is_rounded_in_the_middle_of_it_has_another_norm() -> None:
    model = layer(LAYERS["dora"], torch.float32, True)
    x = torch.randn(3, 20)
    with trimtab.for_inference(model), torch.no_grad():
        model(x)
        model.bfloat16().float()
        exact = x @ trimtab.effective_weight(model, "0").t() + model[0].bias
        torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)


def test_without_its_adapters_a_model_is_the_bare_one() -> None:
    block = nn.Sequential(nn.Linear(12, 12), nn.GELU())
    base = nn.Sequential(block, nn.Linear(12, 7, bias=False))
    net = copy.deepcopy(base)
    trimtab.attach(
        net,
        [
            trimtab.Rule(match="*.0", method="dora", rank=2),
            trimtab.Rule(match="1", method="full"),
            trimtab.Rule(match="0", method="serial", bottleneck=3),
        ],
    )
    change(net)
    x = torch.randn(4, 12)
    changed = net(x).detach()
    with trimtab.disable_adapter(net):
        assert torch.equal(net(x), base(x))
        assert torch.equal(net[1].weight, base[1].weight)
        with trimtab.disable_adapter(net):
            pass
        assert torch.equal(net(x), base(x)), "an inner context ends, and the outer one goes on"
        net.eval()
    assert torch.equal(net(x), changed)
    assert not any(module.training for module in net.modules()), "modes reach the adapters, too"


def test_without_its_adapters_a_quantised_model_is_what_it_was_at_step_0() -> None:
    from trimtab.bases import find, quantise

    dense = find(nn.Linear(64, 32))
    assert dense is not None
    net = nn.Sequential(quantise(dense, "nf4"))
    trimtab.attach(net, trimtab.Rule(match="0", method="lora", rank=2))
    x = torch.randn(3, 64)
    before = net(x).detach()
    change(net)
    with trimtab.disable_adapter(net), torch.no_grad():
        assert torch.equal(net(x), before)
    assert not torch.equal(net(x), before)


def test_a_tensor_that_is_trained_itself_has_nothing_to_go_back_to() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    trimtab.attach(net, trimtab.Rule(match="0", method="lora", rank=1))
    net[1].requires_grad_(True)
    words = r"2 tensors outside of the adapters .* such as 1\.weight"
    with pytest.warns(trimtab.TrimtabWarning, match=words), trimtab.disable_adapter(net):
        pass


def test_a_model_without_adapters_has_none_to_disable() -> None:
    with pytest.raises(trimtab.SurgeryError, match="no adapters"), trimtab.disable_adapter(nn.Sequential()):
        pass


def test_a_reference_shares_the_tensors_of_the_model_and_computes_without_its_adapters() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    base, x = copy.deepcopy(net), torch.randn(3, 6)
    seen: list[int] = []
    net.register_forward_hook(lambda *_: seen.append(1))
    trimtab.attach(net, trimtab.Rule(match="0", method="dora", rank=2))
    change(net)
    got = net(x)
    bare = trimtab.reference(net)
    assert torch.equal(bare(x), base(x))
    assert torch.equal(net(x), got), "the model itself goes on with them"
    with pytest.raises(RuntimeError):
        bare(torch.randn(3, 7))
    assert torch.equal(net(x), got), "and after an error, too"
    assert {id(one) for one in bare.parameters()} == {id(one) for one in net.parameters()}
    with pytest.raises(trimtab.SurgeryError, match="no adapters"):
        trimtab.reference(base)
