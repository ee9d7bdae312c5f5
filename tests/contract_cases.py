"""What the contract suite runs on: methods with their options, the bases that they take, dtypes and shapes, so chosen
that every value of each meets every value of the others (``pairwise``).

Methods and bases are read from the library's folders. A new method file is picked up with its switches and choices;
what else its options are tried with stands in ``VALUES``. A new base file needs one line in ``BUILDERS``: how to make
a layer (or a block) of that kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pairwise
import plain_formula
import sampling
import trimtab
from stored_weights import stored_weight
from trimtab import bases, methods
from trimtab.surgery.adapted import Adapted

# Values of options beside their defaults, the two values of a switch and the words of a choice, which are all tried.
VALUES: dict[str, dict[str, list[Any]]] = {
    "lora": {"rank": [2, 3, 0], "alpha": [None, 5.0, 1.0]},
    "dora": {"rank": [2, 3, 0], "alpha": [None, 5.0, 1.0]},
    "parallel": {"scale": [4.0, 0.5]},
}
SMALL = {"rank": [2], "bottleneck": [4], "dropout": [0.0, 0.5]}
# Tested apart: the dtype of the trained tensors, in test_numerics.
APART = {"dtype"}
# Made of a linear layer, once its weight has its values. None of them knows float64.
QUANTISED = {"int8", "nf4", "torchao_int8"}
# Weights that hang on a module, which no layer multiplies with: tests/surgery/test_held_parameters.py and
# tests/bases/test_experts.py.
HELD = {"attention", "experts", "parameter", "router"}
ALWAYS_BIASED = {"conv1d", *QUANTISED}
NEVER_BIASED = {"embedding"}


class Block(nn.Module):
    """The smallest block: one layer inside."""

    def __init__(self, out_features: int, in_features: int, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Whole(nn.Module):
    """A module that no other base knows."""

    def __init__(self, out_features: int, in_features: int, bias: bool) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(out_features, in_features))
        self.shift = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return plain_formula.product(x, self.matrix, self.shift)


def convolution(out_features: int, in_features: int, bias: bool) -> nn.Conv2d:
    """One with a kernel as large as the features allow."""
    kernel = next(sides for sides in [(2, 2), (3, 3), (1, 1)] if in_features % (sides[0] * sides[1]) == 0)
    return nn.Conv2d(in_features // (kernel[0] * kernel[1]), out_features, kernel, bias=bias)


def on_a_matrix(layer: Any, x: Tensor, kind: str) -> Tensor:
    """What a layer that is no matrix product over the last dimension gives for ``x [..., in]``: a convolution sees each
    token as an image of the size of its kernel, and of a look-up all entries are taken, each as often as ``x`` says."""
    if kind == "convolution":
        return layer(x.reshape(-1, layer.in_channels, *layer.kernel_size)).reshape(*x.shape[:-1], layer.out_channels)
    if kind == "embedding":
        return x @ layer(torch.arange(layer.num_embeddings, device=x.device))
    return layer(x)


BUILDERS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "linear": lambda out_features, in_features, bias: nn.Linear(in_features, out_features, bias=bias),
    "conv1d": lambda out_features, in_features, bias: Conv1D(out_features, in_features),
    "block": Block,
    "module": Whole,
    "table": lambda out_features, in_features, bias: nn.Embedding(out_features, in_features),
    "convolution": convolution,
    "embedding": lambda out_features, in_features, bias: nn.Embedding(in_features, out_features),
    **dict.fromkeys(QUANTISED, lambda out_features, in_features, bias: nn.Linear(in_features, out_features, bias=bias)),
}
# (out, in): more inputs, more outputs, and neither side a multiple of MoRA's k (8 at rank 2 for all three).
SHAPES = [(12, 20), (24, 9), (13, 17)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def options_of(method: str) -> dict[str, list[Any]]:
    """The options of a method and the values that each is tried with."""
    values = VALUES.get(method, {})
    return {
        name: values.get(name) or _values(name, field.annotation, field.default)
        for name, field in methods.options_class(method).model_fields.items()
        if name not in APART
    }


def _values(name: str, kind: Any, default: Any) -> list[Any]:
    if kind is bool:
        return [default, not default]
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return SMALL.get(name, [default])


def allowed(method: str, row: Mapping[str, Any]) -> bool:
    """Whether what is said so far may stand in one case: what has no meaning together is not tried together."""
    base, magnitude, rank = row.get("base"), row.get("magnitude"), row.get("rank")
    if base in ALWAYS_BIASED and row.get("biased") is False:
        return False
    if base in NEVER_BIASED and (row.get("biased") or (row.get("bias") and method != "full")):
        return False
    if base == "embedding" and row.get("dropout"):  # there is nothing to drop
        return False
    if base in ("convolution", "embedding") and method == "full" and magnitude is False:
        return False  # trained as they are stored, like any module
    if base in QUANTISED and row.get("base_dtype") == torch.float64:
        return False
    if magnitude is False and (row.get("magnitude_axis") == "input" or row.get("detach_norm") is False):
        return False
    if magnitude is False and (row.get("keep_product") or rank == 0):
        return False
    if rank == 0 and (row.get("alpha") or row.get("rank_stabilised") or row.get("dropout")):
        return False
    if method == "full":
        return not row.get("dropout")
    return not (row.get("bias") and row.get("biased") is False)


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
                change(layer.weight.t() if self.base in ("conv1d", "embedding") else layer.weight.flatten(1))
        layer = layer.to(self.dtype)
        return Holder(quantise(layer, self.base) if self.base in QUANTISED else layer, self.base)

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

    def __init__(self, layer: nn.Module, kind: str = "linear") -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return on_a_matrix(self.layer, x, self.kind)

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
        # What is stored, rounded once to the dtype that it multiplies in; read without the handle, which is under test.
        self.weight = stored_weight(handle.module).to(handle.dtype).double()
        self.own_bias = None if handle.bias is None else handle.bias.detach().double()
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

    @property
    def bias(self) -> Tensor | None:
        return self.tensors.get("bias", self.own_bias)

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
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    on: Sequence[str] | None = None,
    **fixed: Any,
) -> list[Case]:
    """Cases of all methods in which any two values of what they differ in stand together at least once.

    ``on`` names the bases, if not all; ``fixed`` gives single values to what a case differs in (see ``factors``), and
    leaves out a method that cannot have one. With ``pytest --all``, every configuration stands on every base in every
    dtype beside them.
    """
    return [case for case, *_ in cases_with({}, dtypes, shapes, on=on, **fixed)]


def cases_with(
    more: Mapping[str, Sequence[Any]],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    on: Sequence[str] | None = None,
    **fixed: Any,
) -> list[tuple[Any, ...]]:
    """The same, where ``more`` has further things in which cases differ: each case, and a value of each of these."""
    found: dict[tuple[Any, ...], None] = {}
    for method in methods.names():
        varied = factors(method, dtypes, shapes, on) | {name: list(values) for name, values in more.items()}
        if any(value not in varied.get(name, []) for name, value in fixed.items()):
            continue
        varied |= {name: [value] for name, value in fixed.items()}
        certain = {name: values[0] for name, values in varied.items() if len(values) == 1}
        varied = {
            name: [value for value in values if allowed(method, {**certain, name: value})]
            for name, values in varied.items()
        }
        if not all(varied.values()):
            continue
        rows = pairwise.cover(varied, partial(allowed, method))
        if sampling.everything:
            rows += full_product(method, varied)
        found |= dict.fromkeys((_case(method, row), *(row[name] for name in more)) for row in rows)
    return list(found)


def each_once(found: Sequence[Case]) -> list[Case]:
    """Those of ``found`` that bring their method a base or a value of an option that it has not met before: for what
    two options do together no other way than each alone. With ``pytest --all``, all."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for case in found:
        values = {name: case.said.get(name) for name in options_of(case.method)}
        met = {
            (case.method, name, value) for name, value in (*values.items(), ("base", case.base), ("bias", case.bias))
        }
        if sampling.everything or met - seen:
            kept.append(case)
            seen |= met
    return kept


def factors(
    method: str,
    dtypes: Sequence[torch.dtype] = DTYPES,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    on: Sequence[str] | None = None,
) -> dict[str, list[Any]]:
    """All that cases of one method differ in, and the values of each."""
    sits_on = methods.method_class(method).sits_on
    known = [base for base in bases.names(sits_on) if base not in HELD and (on is None or base in on)]
    layer = {"base": known, "biased": [True, False], "base_dtype": list(dtypes), "shape": list(shapes)}
    return layer | options_of(method)


def full_product(method: str, varied: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every configuration on every base in every dtype, and so on; shapes take turns. A configuration is one option
    away from the plain one, or from the plain one with a magnitude: all options with each other are millions."""
    options = {name: values for name, values in varied.items() if name in options_of(method)}
    plain = {name: values[0] for name, values in options.items()}
    starts = [{**plain, "magnitude": value} for value in options.get("magnitude", [])] or [plain]
    said = [{**start, name: value} for start in starts for name, values in options.items() for value in values]
    around = {name: values for name, values in varied.items() if name not in options and name != "shape"}
    places = [dict(zip(around, values, strict=True)) for values in product(*around.values())]
    shapes = cycle(varied["shape"])
    rows = [{**place, **one, "shape": next(shapes)} for one in said for place in places]
    return [row for row in rows if allowed(method, row)]


def _case(method: str, row: Mapping[str, Any]) -> Case:
    fields = methods.options_class(method).model_fields
    said = {name: row[name] for name in options_of(method) if row[name] != fields[name].default}
    return Case(method, tuple(said.items()), row["base"], row["biased"], row["base_dtype"], row["shape"])


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
