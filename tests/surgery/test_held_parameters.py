"""Adapters on weights that hang directly on a module: what the module reads, and that nothing else about it changes.

``Mixer`` stands for such a module; in its place ``nn.MultiheadAttention`` is what the library knows.
"""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import pairwise
import plain_formula
import trimtab
from contract_cases import allowed, options_of, stir
from trimtab.surgery.adapted import adapted_modules, bare_modules, block_lists

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 3, "alpha": 5},
    "mora": {"rank": 2},
    "full": {},
}
WIDTHS = {"one width": {}, "own widths": {"kdim": 6, "vdim": 10}}


class Model(nn.Module):
    """An attention of 12 features in 3 heads over something else, then a layer."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True, **widths)
        self.last = nn.Linear(12, 5)
        self.context = torch.randn(2, 4, widths.get("kdim", 12)), torch.randn(2, 4, widths.get("vdim", 12))

    def forward(self, x: Tensor) -> Tensor:
        key, value = (context.to(x.dtype) for context in self.context)
        attended: Tensor = self.attention(x, key, value, need_weights=False)[0]
        return self.last(attended.tanh())


def made(widths: str = "one width") -> Model:
    torch.default_generator.manual_seed(3)
    return Model(**WIDTHS[widths]).double()


def attached(method: str, widths: str = "one width", **options: Any) -> Model:
    model = made(widths)
    trimtab.attach(model, trimtab.Rule(match="*.*proj_weight", method=method, **METHODS[method] | options))
    stir(model)
    return model


def batch() -> Tensor:
    return torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("widths", WIDTHS)
def test_step_0_changes_nothing_and_detach_gives_everything_back(widths: str) -> None:
    model = made(widths)
    before, objects = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    outputs = model(batch())
    report = trimtab.attach(model, trimtab.Rule(match="attention", method="lora", rank=2))
    names = ["in_proj_weight"] if widths == "one width" else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert [module.name for module in report.modules] == [f"attention.{name}" for name in [*names, "out_proj"]]
    assert isinstance(model.attention, nn.MultiheadAttention)
    assert torch.equal(model(batch()), outputs)
    assert trimtab.detach(model) == len(names) + 1
    assert type(model.attention) is nn.MultiheadAttention
    after = dict(model.named_parameters())
    assert list(after) == list(objects)
    assert all(after[name] is objects[name] and after[name].requires_grad for name in objects)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("method", METHODS)
def test_the_module_computes_with_the_effective_weights(method: str, widths: str) -> None:
    model, bare = attached(method, widths), made(widths)
    for name, module in adapted_modules(model):
        frozen, tensors = bare.get_parameter(name), dict(module.adapter.named_parameters())
        total = frozen + plain_formula.update(method, METHODS[method], tensors, frozen)
        weight = plain_formula.effective(total, tensors.get("magnitude"))
        assert torch.allclose(trimtab.effective_weight(model, name), weight, atol=1e-12)
        with torch.no_grad():
            frozen.copy_(weight)
            if "bias" in tensors:  # full trains what belongs to the weight, too
                bare.attention.in_proj_bias.copy_(tensors["bias"])
    assert torch.allclose(model(batch()), bare(batch()), atol=1e-12)
    with torch.no_grad():  # torch's fused attention, in eval mode
        assert torch.allclose(model.eval()(batch()), bare(batch()), atol=1e-12)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_by_finite_differences(method: str, widths: str) -> None:
    options = {"detach_norm": False} if method == "dora" else {}
    model = attached(method, widths, **options)
    model(batch()).square().sum().backward()
    for name, parameter in trimtab.trainable_parameters(model).items():
        assert parameter.grad is not None, name
        direction = torch.randn_like(parameter)
        step, sums = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                sums.append(model(batch()).square().sum())
                parameter.sub_(direction, alpha=sign * step)
        expected = (sums[0] - sums[1]) / (2 * step)
        assert torch.isclose((parameter.grad * direction).sum(), expected, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("method", METHODS)
def test_merged(method: str) -> None:
    model = attached(method)
    outputs = model(batch())
    report = trimtab.merge(model)
    assert report.untied == ()
    assert type(model.attention) is nn.MultiheadAttention
    assert torch.allclose(model(batch()), outputs, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(method: str, tmp_path: Path) -> None:
    model, other = attached(method), made()
    trimtab.save_adapter(model, tmp_path)
    report = trimtab.load_adapter(other, tmp_path)
    assert [module.name for module in report.modules] == ["attention.in_proj_weight"]
    assert torch.equal(model(batch()), other(batch()))


def rows(method: str) -> list[dict[str, Any]]:
    """Options such that any two values of two options stand together once; there is no dropout, and no bias here."""
    varied = {name: values for name, values in options_of(method).items() if name not in ("dropout", "bias", "tensors")}
    return pairwise.cover(varied, partial(allowed, method))


@pytest.mark.parametrize(
    ("method", "said"), [(method, said) for method in METHODS for said in rows(method)], ids=lambda value: str(value)
)
def test_every_option(method: str, said: dict[str, Any]) -> None:
    model, bare = made("own widths"), made("own widths")
    trimtab.attach(model, trimtab.Rule(match="*.[qkv]_proj_weight", method=method, **said))
    stir(model)
    weights, pairs = {}, []
    for name, module in adapted_modules(model):
        tensors = {key: value.detach().requires_grad_() for key, value in module.adapter.named_parameters()}
        frozen = bare.get_parameter(name).detach()
        total = frozen + plain_formula.update(method, said, tensors, frozen)
        axis, detach = said["magnitude_axis"], said["detach_norm"]
        weights[name] = plain_formula.effective(total, tensors.get("magnitude"), axis, detach)
        if "bias" in tensors:
            weights["attention.in_proj_bias"] = tensors["bias"]
        pairs += [(value, tensors[key]) for key, value in module.adapter.named_parameters()]
    expected, outputs = functional_call(bare, weights, (batch(),)), model(batch())
    assert torch.allclose(outputs, expected, atol=1e-12)
    sign = torch.randn_like(expected)
    (outputs * sign).sum().backward()
    (expected * sign).sum().backward()
    for got, want in pairs:
        assert got.grad is not None
        assert torch.allclose(got.grad, want.grad, atol=1e-11)


def test_copies_and_pickles_go_their_own_way() -> None:
    model = attached("dora")
    outputs = model(batch()).detach()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)
    stir(model)
    for other in copies:
        assert type(other.attention) is type(model.attention)
        assert torch.equal(other(batch()), outputs)
        trimtab.detach(other)
        assert torch.equal(other(batch()), made()(batch()))
    assert not torch.equal(model(batch()), outputs)


def test_the_state_keeps_its_names_and_loads() -> None:
    model, bare = attached("lora"), made()
    names = set(model.state_dict())
    assert set(bare.state_dict()) <= names
    other = attached("lora")
    stir(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch()), model(batch()))
    again = attached("lora")
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(again(batch()), model(batch()))


def test_moved_to_another_dtype() -> None:
    model = attached("lora")
    expected = model(batch())
    assert model.float().attention.in_proj_weight.dtype == torch.float32
    assert torch.allclose(model(batch().float()).double(), expected, atol=1e-5)


def test_a_module_in_two_places_and_a_weight_on_two_modules() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.MultiheadAttention(8, 2)
            self.same = self.one
            self.other = nn.MultiheadAttention(8, 2)
            self.other.in_proj_weight = self.one.in_proj_weight

        def forward(self, x: Tensor) -> Tensor:
            for attention in (self.one, self.same, self.other):
                x = x + attention(x, x, x, need_weights=False)[0]
            return x

    model = Twice().double()
    report = trimtab.attach(model, trimtab.Rule(match="*in_proj_weight", method="lora", rank=2))
    assert [(module.name, module.aliases) for module in report.modules] == [
        ("one.in_proj_weight", ("same.in_proj_weight",)),
        ("other.in_proj_weight", ()),
    ]
    assert report.trainable_parameters == 2 * 8 + 24 * 2
    stir(model)
    x = torch.randn(3, 1, 8, dtype=torch.float64)
    outputs = model(x)
    assert trimtab.merge(model).untied == ()
    assert model.other.in_proj_weight is model.one.in_proj_weight
    assert torch.allclose(model(x), outputs, atol=1e-12)


def test_the_bare_model_lists_what_hangs_on_its_modules() -> None:
    names = [name for name, _ in bare_modules(made())]
    assert names == ["", "attention", "attention.in_proj_weight", "attention.out_proj", "last"]
    assert names == [name for name, _ in bare_modules(attached("lora"))]


def test_a_weight_that_became_a_tensor_of_another_kind_keeps_its_adapter(tmp_path: Path) -> None:
    """FSDP2 shards it, for instance."""

    class Sharded(Tensor):
        def full_tensor(self) -> Tensor:
            return self.as_subclass(Tensor)

        to_local = full_tensor

    model = attached("lora")
    frozen = model.attention._parameters["in_proj_weight"]
    model.attention._parameters["in_proj_weight"] = nn.Parameter(frozen.detach().as_subclass(Sharded), False)
    assert [name for name, _ in adapted_modules(model)] == ["attention.in_proj_weight"]
    assert model.attention.in_proj_weight is model.attention._parameters["in_proj_weight"], "fully_shard asks for it"
    with pytest.raises(trimtab.SurgeryError, match="is sharded while the module computes with it"):
        model(batch())
    trimtab.save_adapter(model, tmp_path)
    model.attention._parameters["in_proj_weight"] = frozen
    other = made()
    trimtab.load_adapter(other, tmp_path)
    assert torch.equal(other(batch()), model(batch()))


def test_blocks_of_which_some_hold_an_adapter_are_still_of_one_class() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(3))})
    trimtab.attach(model, trimtab.Rule(match="*.in_proj_weight", layers="1", method="lora", rank=2))
    assert list(block_lists(model)) == [model["blocks"]]


def test_dropout_has_no_input_to_drop() -> None:
    with pytest.raises(trimtab.PlanError, match="read by the module that holds it"):
        trimtab.attach(made(), trimtab.Rule(match="attention", method="lora", rank=2, dropout=0.1))


def test_turned_off() -> None:
    model = attached("dora")
    with trimtab.disable_adapter(model):
        assert torch.allclose(model(batch()), made()(batch()), atol=1e-12)


@pytest.mark.full
def test_compiled() -> None:
    model = attached("dora")
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        compiled(batch()).square().sum().backward()
        got = {name: parameter.grad for name, parameter in trimtab.trainable_parameters(model).items()}
        model.zero_grad()
        model(batch()).square().sum().backward()
        for name, parameter in trimtab.trainable_parameters(model).items():
            assert parameter.grad is not None
            assert got[name] is not None
            assert torch.allclose(got[name], parameter.grad, atol=1e-12)
        stir(model)  # what was compiled must not remember


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("method", METHODS)
def test_a_bias_beside_the_weight(method: str, widths: str, tmp_path: Path) -> None:
    model, bare = attached(method, widths, bias=True) if method != "full" else attached(method, widths), made(widths)
    (name,) = (name for name in trimtab.trainable_parameters(model) if name.endswith("adapter.bias"))
    trained = trimtab.trainable_parameters(model)[name]
    assert trained.shape == (36,)
    assert model.attention.in_proj_bias is not model.attention._parameters["in_proj_bias"]
    for place, module in adapted_modules(model):
        with torch.no_grad():
            bare.get_parameter(place).copy_(trimtab.effective_weight(model, place))
            if module.adapter.bias is not None:
                bare.attention.in_proj_bias.copy_(trained)
    outputs = model(batch())
    assert torch.allclose(outputs, bare(batch()), atol=1e-12)
    sign = torch.randn_like(outputs)
    bare.attention.in_proj_bias.requires_grad_()
    (bare(batch()) * sign).sum().backward()
    (outputs * sign).sum().backward()
    assert torch.allclose(trained.grad, bare.attention.in_proj_bias.grad, atol=1e-12)
    trimtab.save_adapter(model, tmp_path)
    other = made(widths)
    trimtab.load_adapter(other, tmp_path)
    assert torch.equal(other(batch()), outputs)
    with trimtab.disable_adapter(other):
        assert torch.allclose(other(batch()), made(widths)(batch()), atol=1e-12)
    trimtab.detach(other)
    assert torch.equal(other(batch()), made(widths)(batch()))
    trimtab.merge(model)
    assert type(model.attention) is nn.MultiheadAttention
    assert torch.allclose(model(batch()), outputs, atol=1e-12)


def test_a_copy_that_shares_the_adapter_reads_its_own_weight() -> None:
    """What DataParallel makes of a module: plain tensors where its parameters are."""
    model = attached("lora", bias=True)
    replica = model.attention._replicate_for_data_parallel()
    for name, parameter in model.attention._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach() + 1)
    assert isinstance(replica, nn.MultiheadAttention)
    assert torch.allclose(replica.in_proj_weight, model.attention.in_proj_weight + 1, atol=1e-12)
    assert torch.equal(replica.in_proj_bias, model.attention.in_proj_bias)
    assert torch.allclose(replica.bias_k, model.attention.bias_k + 1)


def test_on_the_meta_device_and_back() -> None:
    model = attached("dora")
    with torch.device("meta"):
        other = Model()
    trimtab.attach(other, trimtab.Rule(match="*.*proj_weight", method="dora", **METHODS["dora"]))
    assert other.attention.in_proj_weight.is_meta
    other = other.double().to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    other.context = model.context
    assert torch.allclose(other(batch()), model(batch()), atol=1e-12)


def test_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = attached("dora").eval()
    with torch.no_grad():
        outputs = model(batch())
        accelerate.cpu_offload(
            model, execution_device=torch.device("cpu"), preload_module_classes=["MultiheadAttention"]
        )
        assert model.attention._parameters["in_proj_weight"].is_meta
        assert torch.allclose(model(batch()), outputs, atol=1e-12)
