"""The adapter blocks: sizes, start, dropout, dtypes, and calls of every form. Their outputs and gradients against
float64 are in the contract suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import plain_formula
import trimtab
from trimtab import methods
from trimtab.ops.dropout import dropout

BLOCKS = methods.names("block")


class Both(NamedTuple):
    hidden: Tensor
    rest: str


class Mixer(nn.Module):
    """6 features to 5, in whatever form is asked for."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 9), nn.Linear(9, 5)
        self.form = form

    def forward(self, hidden_states: Tensor, *, mask: Tensor | None = None) -> Any:
        return self.form(self.narrow(self.wide(hidden_states).relu()))


def adapted(method: str, form: Callable[[Tensor], Any] = lambda y: y, **options: Any) -> nn.ModuleDict:
    """A mixer with an adapter that has moved away from its start."""
    model = nn.ModuleDict({"mixer": Mixer(form)})
    trimtab.attach(model, trimtab.Rule(match="mixer", method=method, **{"bottleneck": 3, **options}))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_they_are_found() -> None:
    assert BLOCKS == ["parallel", "serial"]
    assert not set(BLOCKS) & set(methods.names("weight"))


@pytest.mark.parametrize(("method", "down"), [("serial", [3, 5]), ("parallel", [3, 6])])
def test_sizes_and_start(method: str, down: list[int]) -> None:
    model = nn.ModuleDict({"mixer": Mixer()})
    report = trimtab.attach(model, trimtab.Rule(match="mixer", method=method, bottleneck=3))
    tensors = dict(model["mixer"].adapter.named_parameters())
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "down": down,
        "down_bias": [3],
        "up": [5, 3],
        "up_bias": [5],
    }
    assert bool(tensors["down"].all()), "drawn, so that up learns from the first step"
    assert not any(tensors[name].any() for name in ("down_bias", "up", "up_bias"))
    assert report.trainable_parameters == 3 * down[1] + 3 + 5 * 3 + 5
    assert (report.modules[0].out_features, report.modules[0].in_features) == (5, down[1])


def test_how_the_first_projection_is_drawn() -> None:
    """Uniform between -1/sqrt(in) and 1/sqrt(in), as LoRA's A is: 12,800 draws come within 2 % of the bound."""
    model = nn.ModuleDict({"wide": nn.Sequential(nn.Linear(400, 400))})
    trimtab.attach(model, trimtab.Rule(match="wide", method="serial", bottleneck=32))
    down = model["wide"].adapter.down
    assert down.shape == (32, 400)
    assert 0.98 / 20 < float(down.detach().abs().max()) <= 1 / 20


def test_defaults_are_the_papers() -> None:
    serial, parallel = methods.options_class("serial")(), methods.options_class("parallel")()
    assert serial.model_dump() == {
        "dropout": 0.0, "dtype": None, "bottleneck": 64, "activation": "gelu", "width": None
    }  # fmt: skip
    assert (parallel.activation, parallel.scale) == ("relu", 4.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", BLOCKS)
def test_an_output_of_any_form(method: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 6)
    plain = adapted(method)
    want = plain["mixer"](x)
    forms: list[Callable[[Tensor], Any]] = [lambda y: (y, "rest"), lambda y: [y], lambda y: Both(y, "rest")]
    for form in forms:
        model = adapted(method, form)
        model.load_state_dict(plain.state_dict())
        got = model["mixer"](x)
        assert type(got) is type(form(x))
        assert torch.equal(got[0], want)
        assert got[1:] == form(x)[1:]


@pytest.mark.parametrize("method", BLOCKS)
def test_a_call_of_any_form(method: str) -> None:
    model = adapted(method)
    x = torch.randn(2, 3, 6)
    want = model["mixer"](x)
    assert torch.equal(model["mixer"](hidden_states=x), want)
    assert torch.equal(model["mixer"](mask=None, hidden_states=x), want), "the input is known by its name"
    assert torch.equal(model["mixer"](x, mask=torch.ones(3)), want)


def test_an_output_without_a_hidden_state_is_refused() -> None:
    for form in (lambda y: {"hidden": y}, lambda y: ("rest", y), lambda y: ()):
        model = adapted("serial", form)
        with pytest.raises(trimtab.SurgeryError, match=r"Mixer that carries an adapter block gave a (dict|tuple)"):
            model["mixer"](torch.randn(2, 6))


class Generator(nn.Module):
    """A block that takes no hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, *, size: int) -> Tensor:
        return self.inner(torch.ones(size, 4))


def test_a_call_without_an_input_suits_the_serial_form_only() -> None:
    for method in BLOCKS:
        model = nn.ModuleDict({"a": Generator()})
        trimtab.attach(model, trimtab.Rule(match="a", method=method, bottleneck=2))
        if method == "serial":
            assert model["a"](size=2).shape == (2, 4)
            continue
        with pytest.raises(trimtab.SurgeryError, match="no input beside which to stand"):
            model["a"](size=2)


@pytest.mark.parametrize("method", BLOCKS)
def test_a_wrong_width_is_named_at_the_call(method: str) -> None:
    """And never broadcast: a block that gives one feature would otherwise come out three wide."""
    model = nn.ModuleDict({"mixer": Mixer(lambda y: y[..., :1])})
    trimtab.attach(model, trimtab.Rule(match="mixer", method=method, width=3))
    with pytest.raises(trimtab.SurgeryError, match=r"made for hidden states of 3 -> 3 features met \d -> 1"):
        model["mixer"](torch.randn(2, 6))


@pytest.mark.parametrize("method", BLOCKS)
def test_dropout_acts_on_the_input_of_the_update_only(method: str) -> None:
    model = adapted(method, dropout=0.5).train()
    x = torch.randn(7, 6)
    base = model["mixer"].base
    hidden = base.narrow(base.wide(x).relu()).detach()
    torch.default_generator.manual_seed(3)
    got = model["mixer"](x)
    torch.default_generator.manual_seed(3)
    mask = dropout(torch.ones_like(hidden if method == "serial" else x), 0.5)
    assert 0 < (mask == 0).sum() < mask.numel()
    tensors = {name: value.detach().double() for name, value in model["mixer"].adapter.named_parameters()}
    if method == "serial":
        want = hidden + plain_formula.bottleneck("gelu", tensors, (hidden * mask).double())
    else:
        want = hidden + 4 * plain_formula.bottleneck("relu", tensors, (x * mask).double())
    assert torch.allclose(got.double(), want, atol=1e-5)
    assert torch.equal(model.eval()["mixer"](x), model["mixer"](x))


@pytest.mark.parametrize("method", BLOCKS)
def test_dtypes(method: str) -> None:
    """Computed in the dtype of the hidden state, from tensors in float32, or in what the rule says."""
    for base, said, stored in [
        (torch.bfloat16, None, torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float64, None, torch.float64),
    ]:
        model = nn.ModuleDict({"mixer": Mixer()}).to(base)
        trimtab.attach(model, trimtab.Rule(match="mixer", method=method, bottleneck=3, dtype=said))
        output = model["mixer"](torch.randn(2, 6, dtype=base))
        assert output.dtype == base
        output.sum().backward()
        for parameter in trimtab.trainable_parameters(model).values():
            assert parameter.dtype == stored
            assert parameter.grad is not None
            assert parameter.grad.dtype == stored
        assert all(parameter.dtype == base for parameter in model["mixer"].base.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bottleneck": 0}, "bottleneck: Input should be greater than or equal to 1"),
        ({"activation": "tanh"}, "'relu', 'gelu' or 'silu'"),
        ({"width": 0}, "width"),
        ({"rank": 8}, "unknown option 'rank' for method parallel"),
        ({"magnitude": True}, "unknown option 'magnitude'"),
        ({"scale": 0}, "scale: Input should be greater than 0"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(trimtab.PlanError) as caught:
        trimtab.Rule(match="*.mlp", method="parallel", **options)
    assert words in str(caught.value)


def test_a_tensor_starts_at_zero_but_for_the_first_of_a_block() -> None:
    block = adapted(BLOCKS[0])["mixer"].current_adapter
    for name in ("down", "up", "up_bias"):
        tensor = torch.ones_like(getattr(block, name).detach())
        block.start(name, tensor)
        assert bool(tensor.any()) == (name == "down")
        assert not torch.equal(tensor, torch.ones_like(tensor))
