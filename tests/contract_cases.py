"""What the contract suite runs on: every method in several configurations, every base that it takes, dtypes, shapes.

Both lists are read from the library's folders. A new method file is picked up with its defaults and its switches; a
method may have more configurations in ``SPECIAL``. A new base file needs one line in ``BUILDERS``: how to make a layer
(or a block) of that kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import plain_formula
import trimtab
from trimtab import bases, methods
from trimtab.surgery.adapted import Adapted

# What only one method knows; the switches that all have are added by `configurations`.
SPECIAL: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"rank": 0, "magnitude": True},
        {"rank": 0, "magnitude": True, "magnitude_axis": "input"},
        {"rank": 3, "alpha": 5, "rank_stabilised": True},
        {"rank": 2, "init": "gaussian", "alpha": 1},
        {"rank": 2, "magnitude": True, "detach_norm": False, "magnitude_axis": "input"},
    ],
    "dora": [{"rank": 0}, {"rank": 3, "alpha": 5, "rank_stabilised": True, "detach_norm": False}],
    "mora": [
        {"rank": 2, "form": "sharing"},
        {"rank": 2, "form": "sharing", "magnitude": True},
        {"rank": 2, "form": "sharing", "magnitude": True, "magnitude_axis": "input", "dropout": 0.5},
    ],
    "serial": [{"bottleneck": 4, "activation": name} for name in ("relu", "gelu", "silu")],
    "parallel": [{"bottleneck": 4, "scale": 0.5, "activation": name} for name in ("relu", "gelu", "silu")],
}
# Made of a linear layer, once its weight has its values. None of them knows float64.
QUANTISED = {"int8", "nf4", "torchao_int8"}
ALWAYS_BIASED = {"conv1d", *QUANTISED}
# torchao's own layer multiplies by the scales after the product, all of it rounded to the dtype: in half precision
# single roundings of the product, the scale, their product and the sum with the bias, of a unit at most each.
OWN_PRODUCT = {"torchao_int8": 4.0}


class Block(nn.Module):
    """The smallest block: one layer inside."""

    def __init__(self, out_features: int, in_features: int, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


BUILDERS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "linear": lambda out_features, in_features, bias: nn.Linear(in_features, out_features, bias=bias),
    "conv1d": lambda out_features, in_features, bias: Conv1D(out_features, in_features),
    "block": Block,
    **dict.fromkeys(QUANTISED, lambda out_features, in_features, bias: nn.Linear(in_features, out_features, bias=bias)),
}
# (out, in): more inputs, more outputs, and neither side a multiple of MoRA's k (8 at rank 2 for all three).
SHAPES = [(12, 20), (24, 9), (13, 17)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def configurations(method: str) -> list[dict[str, Any]]:
    """The options that a method is tried with: a small rank, then one switch more at a time."""
    fields = methods.options_class(method).model_fields
    if methods.method_class(method).sits_on == "block":
        small = {"bottleneck": 4}
        return [small, {**small, "dropout": 0.5}, *SPECIAL.get(method, [])]
    plain: dict[str, Any] = {"rank": 2} if "rank" in fields else {}
    always_on = fields["magnitude"].default is True
    decomposed = plain if always_on else {**plain, "magnitude": True}
    found = [
        plain,
        decomposed,
        {**decomposed, "magnitude_axis": "input"},
        {**decomposed, "detach_norm": False},
        {**decomposed, "keep_product": True},
    ]
    if method != "full":  # there is no update beside the base whose input could be dropped
        found += [{**plain, "dropout": 0.5}, {**decomposed, "dropout": 0.5}]
        found += [{**said, "compute": form} for said in (plain, decomposed) for form in ("folded", "factored")]
    found += SPECIAL.get(method, [])
    return [one for place, one in enumerate(found) if one not in found[:place]]


@dataclass(frozen=True)
class Case:
    """One method in one configuration on one layer."""

    method: str
    options: tuple[tuple[str, Any], ...]
    base: str
    bias: bool
    dtype: torch.dtype
    shape: tuple[int, int]

    @property
    def said(self) -> dict[str, Any]:
        return dict(self.options)

    @property
    def sits_on(self) -> str:
        return methods.method_class(self.method).sits_on

    @property
    def magnitude(self) -> bool:
        return bool(self.said.get("magnitude", self.method == "dora"))

    @property
    def axis(self) -> str:
        return str(self.said.get("magnitude_axis", "output"))

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def half(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options)
        dtype = str(self.dtype).removeprefix("torch.")
        bias = "" if self.bias else "-nobias"
        return f"{self.method}({options})-{self.base}{bias}-{dtype}-{self.shape[0]}x{self.shape[1]}"

    def bare(self, change: Callable[[Tensor], object] | None = None) -> Holder:
        """The layer alone, random, its weight not touched by any method; but by ``change``, before it is quantised."""
        torch.default_generator.manual_seed(1)
        layer = BUILDERS[self.base](*self.shape, self.bias)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter) / 4)
            if change is not None:
                change(layer.weight.t() if self.base == "conv1d" else layer.weight)
        layer = layer.to(self.dtype)
        return Holder(quantise(layer, self.base) if self.base in QUANTISED else layer)

    def fresh(self) -> Holder:
        """The layer with an adapter at its start."""
        model = self.bare()
        trimtab.attach(model, trimtab.Rule(match="layer", method=self.method, **self.said))
        return model

    def trained(self) -> Holder:
        """The layer with an adapter that has moved away from its start, in eval mode where dropout is on."""
        model = self.fresh()
        stir(model)
        return model.eval() if self.said.get("dropout") else model

    def input(self, *tokens: int) -> Tensor:
        return torch.randn(*(tokens or (7,)), self.shape[1]).to(self.dtype)


def quantise(layer: nn.Module, kind: str) -> nn.Module:
    """A layer of ``kind`` with the weight of a dense one."""
    dense = bases.find(layer)
    assert dense is not None
    return bases.quantise(dense, kind)


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @property
    def adapted(self) -> Adapted:
        assert isinstance(self.layer, Adapted)
        return self.layer


def stir(model: nn.Module, size: float = 0.06) -> None:
    """Move every trained tensor: updates by about a quarter of the weight, magnitudes by up to a fifth."""
    with torch.no_grad():
        for name, parameter in trimtab.trainable_parameters(model).items():
            if name.endswith("magnitude"):
                parameter.mul_(0.8 + 0.4 * torch.rand_like(parameter))
            else:
                parameter.add_(size * torch.randn_like(parameter))


def frozen(module: nn.Module) -> bases.Base:
    """A handle on the weight in a layer, or in the block around it."""
    handle = bases.find(module.inner if isinstance(module, Block) else module)
    assert handle is not None
    return handle


class Reference:
    """The plain formula in float64 for one adapted layer or block, on tensors of its own that collect gradients."""

    def __init__(self, adapted: Adapted, case: Case) -> None:
        self.case = case
        handle = frozen(adapted.base)
        self.weight = handle.weight().detach().double()
        self.bias = None if handle.bias is None else handle.bias.detach().double()
        # A method that the formulas do not know yet is held against its own plain formula, in float64.
        self.own = None if case.method in plain_formula.KNOWN else copy.deepcopy(adapted.adapter).double()
        if self.own is None:
            named = adapted.adapter.named_parameters()
            self.tensors = {name: value.detach().double().requires_grad_() for name, value in named}
        else:
            self.tensors = dict(self.own.named_parameters())

    @property
    def magnitude(self) -> Tensor | None:
        return self.tensors.get("magnitude")

    def update(self) -> Tensor:
        if self.own is not None:
            return self.own.total(self.weight) - self.weight
        return plain_formula.update(self.case.method, self.case.said, self.tensors, self.weight)

    def effective(self) -> Tensor:
        detach = self.case.said.get("detach_norm", True)
        return plain_formula.effective(self.weight + self.update(), self.magnitude, self.case.axis, detach)

    def __call__(self, x: Tensor) -> Tensor:
        if self.case.sits_on == "block":
            h = plain_formula.product(x.double(), self.weight, self.bias)
            if self.own is not None:
                return self.own(x.double(), h)
            return plain_formula.block(self.case.method, self.case.said, self.tensors, x.double(), h)
        return plain_formula.product(x.double(), self.effective(), self.bias)


def cases(
    dtypes: list[torch.dtype],
    shapes: list[tuple[int, int]] | None = None,
    *,
    magnitude: bool | None = None,
    dropout: bool | None = None,
    sits_on: str | None = None,
) -> list[Case]:
    """Every configuration of every method on every base of its kind, with and without bias; ``magnitude``, ``dropout``
    and ``sits_on`` pick those that have one (or not) and those on one kind of base. Without ``shapes`` they take turns:
    every configuration meets every shape in every dtype, and dtypes take turns as well on the quantised kinds."""
    found: list[Case] = []
    for method in methods.names(sits_on):
        known = bases.names(methods.method_class(method).sits_on)
        layers = [(base, bias) for base in known for bias in ((True,) if base in ALWAYS_BIASED else (True, False))]
        for number, options in enumerate(configurations(method)):
            for place, (base, bias) in enumerate(layers):
                for turn, dtype in enumerate(_dtypes(base, dtypes, number + place), place):
                    for shape in shapes or [SHAPES[turn % len(SHAPES)]]:
                        found.append(Case(method, tuple(options.items()), base, bias, dtype, shape))
    return [
        case
        for case in found
        if magnitude in (None, case.magnitude) and dropout in (None, bool(case.said.get("dropout")))
    ]


def _dtypes(base: str, dtypes: list[torch.dtype], turn: int) -> list[torch.dtype]:
    """All of ``dtypes`` for a dense base, one of them in turn for a quantised one; the latter know no float64."""
    if base not in QUANTISED:
        return dtypes
    known = [dtype for dtype in dtypes if dtype != torch.float64]
    return known[turn % len(known) :][:1] if known else []


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """No element of ``got`` is further from ``want`` than ``tolerance`` times the largest element of ``want``."""
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    if want.numel() == 0:
        return
    error = (got.detach().double() - want.detach().double()).abs().max().item()
    scale = want.detach().abs().max().item()
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} where the largest is {scale:.3g} ({tolerance=:.3g})"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in trimtab.trainable_parameters(model).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(plain(value), plain(second[name])), name


def plain(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or the numbers that one of a class of its own (torchao's) holds."""
    return getattr(tensor, "qdata", tensor)
