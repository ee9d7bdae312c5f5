"""A new kind of layer is one file in ``bases/``: a look-up and a convolution, put there for one test, take all methods.

What each gives is held against the layer itself with the effective weight in it, by autograd, in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plain_formula
import trimtab
from trimtab import bases
from trimtab.bases import _registry

LOOK_UP = '''
"""``nn.Embedding``: a look-up. The weight is ``[out, in] = [width, vocabulary]``, and stored the other way round."""

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.bases import _base


class LookUpMap:
    reads_features = False

    def rows(self, x):
        return x.flatten()

    def product(self, rows, weight, bias=None):
        return F.embedding(rows, weight.t())

    def output(self, product, shape):
        return product.view(*shape, -1)

    def product_gradient(self, grad_output):
        return grad_output.reshape(-1, grad_output.shape[-1])

    def weight_gradient(self, grad, rows, shape):
        return grad.new_zeros(shape[1], shape[0]).index_add_(0, rows, grad).t()


class EmbeddingBase(_base.WeightBase):
    through = LookUpMap()
    bias = None

    @staticmethod
    def knows(module):
        return type(module) is nn.Embedding

    @property
    def shape(self):
        return self.module.embedding_dim, self.module.num_embeddings

    def weight(self, dtype=None):
        return self.parameter.t()

    def as_stored(self, weight):
        return weight.t()
'''

CONVOLUTION = '''
"""``nn.Conv2d`` without groups: the weight is ``[out, in] = [channels, channels * height * width]``."""

import torch
from torch import nn

from trimtab.bases import _base


class Convolution:
    reads_features = False

    def __init__(self, layer):
        self.kernel, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding

    def rows(self, x):
        return x

    def _shaped(self, weight):
        return weight.reshape(weight.shape[0], -1, *self.kernel)

    def product(self, rows, weight, bias=None):
        y = torch.nn.functional.conv2d(rows, self._shaped(weight), bias, self.stride, self.padding)
        self.size = y.shape[0], y.shape[2], y.shape[3]
        return y.movedim(1, -1).reshape(-1, y.shape[1])

    def output(self, product, shape):
        size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(shape[2:], self.padding, self.kernel, self.stride)]
        return product.view(shape[0], *size, -1).movedim(-1, 1).contiguous()

    def product_gradient(self, grad_output):
        return grad_output.movedim(1, -1).reshape(-1, grad_output.shape[1])

    def _back(self, grad):
        return grad.view(*self.size, -1).movedim(-1, 1)

    def input_gradient(self, grad, weight, shape):
        weight = self._shaped(weight)
        return torch.nn.grad.conv2d_input(shape, weight, self._back(grad), self.stride, self.padding)

    def add_input_gradient(self, target, grad, weight):
        target.add_(self.input_gradient(grad, weight, target.shape))

    def weight_gradient(self, grad, rows, shape):
        size = shape[0], rows.shape[1], *self.kernel
        return torch.nn.grad.conv2d_weight(rows, size, self._back(grad), self.stride, self.padding).flatten(1)


class ConvolutionBase(_base.WeightBase):
    @staticmethod
    def knows(module):
        return type(module) is nn.Conv2d

    @property
    def through(self):
        return Convolution(self.module)

    @property
    def shape(self):
        return self.parameter.shape[0], self.parameter[0].numel()

    def weight(self, dtype=None):
        return self.parameter.flatten(1)

    def as_stored(self, weight):
        return weight.view(self.parameter.shape)
'''

METHODS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 2},
    {"method": "dora", "rank": 2},
    {"method": "dora", "rank": 2, "magnitude_axis": "input"},
    {"method": "dora", "rank": 2, "detach_norm": False},
    {"method": "mora", "rank": 2},
    {"method": "mora", "rank": 2, "form": "sharing", "magnitude": True},
    {"method": "full", "magnitude": True},  # without, the module's own tensors are trained as they are stored
]


@pytest.fixture
def new_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "embedding.py").write_text(LOOK_UP)
    (tmp_path / "convolution.py").write_text(CONVOLUTION)
    monkeypatch.setattr(bases, "__path__", [*bases.__path__, str(tmp_path)])
    listed = (_registry._all, _registry.names, _registry.quantised_names)
    for function in listed:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in listed:
        function.cache_clear()
    for name in ("embedding", "convolution"):
        sys.modules.pop(f"trimtab.bases.{name}", None)
        vars(bases).pop(name, None)


def layers(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer and a batch for it."""
    if kind == "embedding":
        return nn.Embedding(11, 6).double(), torch.randint(11, (2, 7))
    layer = nn.Conv2d(3, 6, (2, 3), stride=(1, 2), padding=(1, 0)).double()
    return layer, torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)


def call(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``layer`` makes of ``x`` with ``weight [out, in]`` and ``bias`` in place of its own."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight.t())
    return F.conv2d(x, weight.view(layer.weight.shape), bias, layer.stride, layer.padding)


@pytest.mark.usefixtures("new_kinds")
@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("kind", ["embedding", "convolution"])
def test_a_new_kind_of_layer_takes_every_method(kind: str, options: dict[str, Any]) -> None:
    layer, x = layers(kind)
    model: Any = nn.Sequential(layer)
    start = model(x).detach()
    trimtab.attach(model, trimtab.Rule(match="0", **options))
    assert type(model[0].handle).__module__ == f"trimtab.bases.{kind}"
    torch.testing.assert_close(model(x), start, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in model[0].adapter.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    trained = trimtab.trainable_parameters(model)

    tensors = {name: value.detach().double().requires_grad_() for name, value in model[0].adapter.named_parameters()}
    weight = model[0].handle.weight().detach()
    total = weight + plain_formula.update(options["method"], options, tensors, weight)
    axis, detach = options.get("magnitude_axis", "output"), options.get("detach_norm", True)
    effective = plain_formula.effective(total, tensors.get("magnitude"), axis, detach)
    wanted = call(layer, x, effective, tensors.get("bias", getattr(layer, "bias", None)))
    got = model(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(wanted)
    leaves = [x] if x.requires_grad else []
    found = torch.autograd.grad(got, [*leaves, *trained.values()], upstream)
    for one, want in zip(found, torch.autograd.grad(wanted, [*leaves, *tensors.values()], upstream), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-9, atol=1e-9)

    trimtab.merge(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
