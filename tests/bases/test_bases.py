"""The kinds of frozen weight: what is known, what is refused, and what each handle reads and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

import trimtab
from trimtab import bases


class Odd(nn.Linear):
    """A linear layer that multiplies in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


class Marked(Tensor):
    """A tensor subclass, as quantisation libraries use for their weights."""


def with_marked_weight() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.randn(3, 4).as_subclass(Marked))
    return layer


def with_weight(weight: Tensor) -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


UNKNOWN = {
    "a subclass": lambda: Odd(4, 3),
    "a look-up in bags": lambda: nn.EmbeddingBag(4, 3),
    "a transposed convolution": lambda: nn.ConvTranspose2d(4, 3, 1),
    "weight norm on a convolution": lambda: parametrizations.weight_norm(nn.Conv1d(4, 3, 1)),
    "int8 weight": lambda: with_weight(torch.zeros(3, 4, dtype=torch.int8)),
    "float8 weight": lambda: with_weight(torch.zeros(3, 4).to(torch.float8_e4m3fn)),
    "tensor subclass": with_marked_weight,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "an old weight norm": lambda: torch.nn.utils.weight_norm(nn.Linear(4, 3)),
    "lazy": lambda: nn.LazyLinear(3),
    "bilinear": lambda: nn.Bilinear(4, 4, 3),
    "container": lambda: nn.Sequential(nn.Linear(4, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_kinds(kind: str) -> None:
    assert bases.find(UNKNOWN[kind]()) is None


def test_the_folder_is_the_list() -> None:
    folder = Path(bases.__file__).parent
    assert set(bases.names()) == {path.stem for path in folder.glob("*.py") if not path.name.startswith("_")}
    assert {"linear", "conv1d"} <= set(bases.names())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_linear(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 3).to(dtype)
    handle = bases.find(layer)
    assert handle is not None
    assert handle.shape == (3, 4)
    assert handle.dtype == dtype
    assert handle.parameter is layer.weight
    assert handle.weight().data_ptr() == layer.weight.data_ptr(), "a look, not a copy"
    assert handle.bias is layer.bias
    assert torch.equal(handle.as_stored(handle.weight()), layer.weight)
    bare = bases.find(nn.Linear(4, 3, bias=False))
    assert bare is not None
    assert bare.bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_conv1d(dtype: torch.dtype) -> None:
    layer = Conv1D(3, 4).to(dtype)  # 4 inputs, 3 outputs, stored as [4, 3]
    handle = bases.find(layer)
    assert handle is not None
    assert layer.weight.shape == (4, 3)
    assert handle.shape == (3, 4)
    assert torch.equal(handle.weight(), layer.weight.t())
    assert handle.weight().data_ptr() == layer.weight.data_ptr()
    assert torch.equal(handle.as_stored(handle.weight()), layer.weight)
    x = torch.randn(5, 4).to(dtype)
    assert torch.equal(nn.functional.linear(x, handle.weight(), handle.bias), layer(x))


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), Conv1D(3, 4)], ids=["linear", "conv1d"])
def test_write_and_norms(layer: nn.Module) -> None:
    handle = bases.find(layer)
    assert handle is not None
    parameter, weight = handle.parameter, torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    handle.write(weight)
    assert handle.parameter is parameter, "in place"
    assert torch.equal(handle.weight(), weight.float())
    assert handle.squared_norms("output").tolist() == [0 + 1 + 4 + 9, 16 + 25 + 36 + 49, 64 + 81 + 100 + 121]
    assert handle.squared_norms("input").tolist() == [0 + 16 + 64, 1 + 25 + 81, 4 + 36 + 100, 9 + 49 + 121]
    assert handle.squared_norms("output").dtype == torch.float64
    assert not handle.squared_norms("output").requires_grad


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: Conv1D(4, 4)], ids=["linear", "conv1d"])
def test_untie(make: type[nn.Module]) -> None:
    first, second = make(), make()
    second.weight = first.weight.requires_grad_(False)
    handle = bases.find(second)
    assert handle is not None
    handle.untie()
    assert second.weight is not first.weight
    assert torch.equal(second.weight, first.weight)
    assert not second.weight.requires_grad
    handle.write(torch.zeros(4, 4))
    assert bool(first.weight.any())


def test_a_parametrised_layer_is_refused_by_name() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", Double())
    with pytest.raises(trimtab.PlanError, match="ParametrizedLinear"):
        trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
