"""Rows of many updates by one launch set, in Triton's interpreter: against the formulas in float64, at segments,
orders, ranks and dtypes drawn at random, since what would be silent is a row that gets its neighbour's adapter."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

import sampling
import trimtab
from trimtab.ops import kernels, reference
from trimtab.ops.frozen_linear import Operands
from trimtab.ops.linear_map import MATRIX
from trimtab.ops.low_rank import LowRank
from trimtab.ops.mixed_rows import MixedProduct, Order, Part
from trimtab.ops.ratio import Ratio
from trimtab.ops.square import Square
from trimtab.surgery.names import entries

pytest.importorskip("trimtab.ops.kernels.triton", reason="triton is not installed", exc_type=ImportError)

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(200, 72), (72, 200), (130, 64), (48, 48)]
# float64 in each way, and each other dtype once.
ONCE = [(1, torch.float64), (1, torch.float32)]
SEEDED = sampling.sample(list(itertools.product(range(20 if sampling.everything else 2), TOLERANCE)), 3, ONCE)
TRAINED = sampling.sample(list(itertools.product([40, 1], TOLERANCE)), 3, ONCE)


def drawn(kind: str, weight: Tensor, dtype: torch.dtype) -> tuple[Operands, Tensor]:
    """The operands of some rows, and their effective weight in float64."""
    out, features = weight.shape
    own = random.choice([dtype, torch.float64 if dtype == torch.float64 else torch.float32])
    bias = random.choice([None, torch.randn(out).to(dtype)])
    bare = Operands(weight=weight, bias=bias, ratio=None, update=None, tensors=(), through=MATRIX)
    full = weight.double()
    if "lora" in kind:
        rank, scale = random.choice([1, 3, 16, 17, 40]), random.choice([0.7, 2.0])
        a, b = (torch.randn(rank, features) * features**-0.5).to(own), torch.randn(out, rank).to(own)
        bare, full = bare._replace(update=LowRank(scale), tensors=(a, b)), full + scale * b.double() @ a.double()
    elif "mora" in kind:
        side, turn = random.choice([10, 16]), random.random() < 0.7
        matrix = (torch.randn(side, side) * 0.2).to(own)
        bare = bare._replace(update=Square(features, out, side, turn), tensors=(matrix,))
        full = full + reference.square_delta(matrix.double(), (out, features), turn=turn)
    if "scaled" in kind:
        values = (torch.rand(out) + 0.5).to(torch.float64 if dtype == torch.float64 else torch.float32)
        bare, full = bare._replace(ratio=Ratio(values, False, None)), full * values.double().unsqueeze(1)
    return bare, full


@pytest.mark.parametrize(("seed", "dtype"), SEEDED, ids=str)
def test_random_segments_get_what_the_formula_says(seed: int, dtype: torch.dtype) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    out, features = SHAPES[seed % len(SHAPES)]
    weight = (torch.randn(out, features) * features**-0.5).to(dtype)
    kinds = random.choices(["bare", "lora", "lora scaled", "mora", "mora scaled", "scaled"], k=random.randint(2, 6))
    sizes = [random.choice([1, 2, 5, 17, 33, 40]) for _ in kinds]
    sorted_already = seed % 2 == 1
    rows = torch.arange(sum(sizes)) if sorted_already else torch.randperm(sum(sizes))
    x, want, parts = torch.randn(len(rows), features).to(dtype), torch.empty(len(rows), out, dtype=torch.float64), []
    for kind, mine in zip(kinds, rows.split(sizes), strict=True):
        operands, full = drawn(kind, weight, dtype)
        start = sum(part.rows.stop - part.rows.start for part in parts)
        parts.append(Part(slice(start, start + len(mine)), operands))
        want[mine] = x[mine].double() @ full.t() + (0 if operands.bias is None else operands.bias.double())
    order = None if sorted_already else Order(rows, rows.argsort())
    with torch.no_grad(), kernels.using("triton"):
        product = MixedProduct(parts, order)
        got, again = product(x, weight, MATRIX), product(x, weight, MATRIX)
    assert product._segments is not None, "each update was added by itself"
    assert got.dtype == dtype
    assert torch.equal(got, again)
    assert float((got.double() - want).abs().max()) <= TOLERANCE[dtype] * float(want.abs().max())


def changed(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(net).values():
            parameter.add_(0.2 * torch.randn_like(parameter))


def adapters() -> tuple[nn.Module, dict[str | None, Tensor]]:
    """A layer with three adapters, one of which is on a second layer alone; and their weights in float64."""
    net = nn.Sequential(nn.Linear(72, 40), nn.Linear(40, 72, bias=False)).double()
    rules = {"a": ("*", "dora", 3), "b": ("*", "mora", 2), "c": ("0", "lora", 20), "d": ("1", "lora", 1)}
    for name, (match, method, rank) in rules.items():
        trimtab.attach(net, trimtab.Rule(match=match, method=method, rank=rank), name=name)
        changed(net)
    weights: dict[str | None, Tensor] = {None: torch.eye(1)}
    for name in rules:
        inner, outer = (net[place].base.weight for place in (0, 1))  # type: ignore[index, union-attr]
        found = entries(net, name)
        inner, outer = (
            found[place].adapter.effective_weight(found[place].handle, torch.float64) if place in found else own
            for place, own in (("0", inner), ("1", outer))
        )
        weights[name] = torch.stack([inner, outer.t()])
    weights[None] = torch.stack([net[0].base.weight, net[1].base.weight.t()])  # type: ignore[index, union-attr]
    return net, weights


@pytest.mark.parametrize("tokens", [1, 18])
def test_a_model_whose_rows_have_adapters_of_their_own(tokens: int) -> None:
    net, weights = adapters()
    names = ["c", "a", None, "b", "d", "a", "b"]
    x = torch.randn(len(names), tokens, 72, dtype=torch.float64)
    with torch.no_grad(), kernels.using("triton"), trimtab.per_row(net, names) as plan:
        got = net(x)
        plan.deal([*reversed(names)])
        other = net(x.flip(0)).flip(0)
    bias = net[0].base.bias  # type: ignore[index, union-attr]
    for row, name in enumerate(names):
        inner, outer = weights[name]
        want = (x[row] @ inner.t() + bias) @ outer
        assert torch.allclose(got[row], want, atol=1e-12), name
        assert torch.allclose(other[row], want, atol=1e-12), name


def test_a_broken_adapter_spoils_no_row_of_another() -> None:
    net, _ = adapters()
    x = torch.randn(4, 3, 72, dtype=torch.float64)
    names = ["a", "b", "c", None]
    with torch.no_grad(), kernels.using("triton"):
        with trimtab.per_row(net, names):
            before = net(x)
        for name in ("a", "b"):
            trimtab.set_adapter(net, name)
            for parameter in trimtab.trainable_parameters(net).values():
                parameter.fill_(float("nan"))
        with trimtab.per_row(net, names):
            after = net(x)
    assert after[:2].isnan().all()
    assert torch.equal(after[2:], before[2:])


def trained_layer(dtype: torch.dtype) -> tuple[nn.Module, list[str | None]]:
    """A layer with adapters that train together: two ranks, a bare magnitude, a trained bias, MoRA of both kinds and
    with a magnitude, rows without any."""
    net = nn.Sequential(nn.Linear(72, 130)).to(dtype)
    rules: dict[str, dict[str, object]] = {
        "a": {"method": "dora", "rank": 3},
        "b": {"method": "lora", "rank": 17, "alpha": 8, "bias": True},
        "c": {"method": "dora", "rank": 5, "bias": True},
        "d": {"method": "lora", "rank": 0, "magnitude": True},
        "e": {"method": "lora", "rank": 3},
        "f": {"method": "mora", "rank": 2, "bias": True},
        "g": {"method": "mora", "rank": 2, "magnitude": True},
        "h": {"method": "mora", "rank": 1, "form": "sharing"},
    }
    for name, said in rules.items():
        trimtab.attach(net, trimtab.Rule(match="0", **said), name=name)  # type: ignore[arg-type]
        changed(net)
    names = ["c", "a", None, "f", "b", "a", "d", "h", "e", "b", "g", "c", "f"]
    random.shuffle(names)
    return net, names


@pytest.mark.parametrize(("tokens", "dtype"), TRAINED, ids=str)
def test_gradients_of_rows_that_train_together(tokens: int, dtype: torch.dtype) -> None:
    net, names = trained_layer(dtype)
    module = net[0]  # type: ignore[index]
    for parameter in module.parameters():
        parameter.requires_grad_(parameter is not module.base.weight and parameter is not module.base.bias)
    entries(net, "e")["0"].adapter.requires_grad_(False)
    x = torch.randn(len(names), tokens, 72).to(dtype)
    upstream = torch.randn(len(names), tokens, 130).to(dtype)

    weight, bias = module.base.weight.double(), module.base.bias.double()
    x64, rows, leaves = x.double().clone().requires_grad_(), [], {}
    for row, name in enumerate(names):
        own = {} if name is None else dict(entries(net, name)["0"].adapter.named_parameters())
        mine = {key: leaves.setdefault((name, key), one.detach().double().requires_grad_()) for key, one in own.items()}
        total, scale = weight, 1.0
        if "A" in mine:
            scale = entries(net, name)["0"].adapter.factors()[0].scale  # type: ignore[arg-type]
            total = weight + scale * mine["B"] @ mine["A"]
        if "M" in mine:
            turn = entries(net, name)["0"].adapter.factors()[0].turn  # type: ignore[arg-type]
            total = weight + reference.square_delta(mine["M"], (130, 72), turn=turn)
        if "magnitude" in mine:
            total = total * (mine["magnitude"] / total.detach().norm(dim=1)).unsqueeze(1)
        rows.append(x64[row] @ total.t() + mine.get("bias", bias))
    want = torch.stack(rows)
    want.backward(upstream.double())

    given = x.clone().requires_grad_()
    calls = []
    with kernels.using("triton"), trimtab.per_row(net, names), pytest.MonkeyPatch.context() as patch:
        from trimtab.surgery import mixing

        original = mixing.mixed_training
        patch.setattr(mixing, "mixed_training", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
        got = net(given)
        got.backward(upstream)
    assert calls, "each adapter had a pass of its own"

    def close(found: Tensor | None, expected: Tensor | None, what: object) -> None:
        assert found is not None
        assert expected is not None
        off = float((found.double() - expected).abs().max() / expected.abs().max())
        assert off <= 3 * TOLERANCE[dtype], (what, off)

    close(got.detach(), want.detach(), "output")
    close(given.grad, x64.grad, "x")
    assert all(one.grad is None for one in entries(net, "e")["0"].adapter.parameters())
    for (name, key), leaf in ((place, leaf) for place, leaf in leaves.items() if place[0] != "e"):
        close(dict(entries(net, name)["0"].adapter.named_parameters())[key].grad, leaf.grad, (name, key))


def test_a_change_before_the_backward_pass_is_an_error() -> None:
    net, names = trained_layer(torch.float32)
    x = torch.randn(len(names), 2, 72)
    with kernels.using("triton"), trimtab.per_row(net, names):
        output = net(x)
        with torch.no_grad():
            for parameter in trimtab.trainable_parameters(net).values():
                parameter.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("trained", [["bias"], ["A"], ["magnitude", "B"]], ids=str)
def test_parts_of_adapters_train_together_as_they_would_alone(trained: list[str]) -> None:
    """And the magnitude of a row of zeros not at all; an adapter whose norm has a gradient needs its own pass."""
    layer = nn.Linear(16, 24).double()
    with torch.no_grad():
        layer.weight[5] = 0
    net = nn.Sequential(layer)
    for name, detach in (("a", True), ("b", True), ("c", False)):
        rule = trimtab.Rule(match="0", method="dora", rank=2, bias=True, detach_norm=detach)
        trimtab.attach(net, rule, name=name)
        changed(net)
    adapters = {name: entries(net, name)["0"].adapter for name in "abc"}
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.B[5] = 0
    x, upstream = torch.randn(3, 2, 16).double(), torch.randn(3, 2, 24).double()
    for names in (["b", "a", "b"], ["a", "c", "a"]):
        found = []
        for together in (True, False):
            for name, adapter in adapters.items():
                trimtab.set_adapter(net, name)
                for key, parameter in adapter.named_parameters():
                    parameter.requires_grad_(key in trained)
                    parameter.grad = None
            for adapter in adapters.values():
                for key, parameter in adapter.named_parameters():
                    parameter.requires_grad_(key in trained)
            if together:
                with kernels.using("triton"), trimtab.per_row(net, names):
                    (net(x) * upstream).sum().backward()
            else:
                for row, name in enumerate(names):
                    (adapters[name](x[row], net[0].handle) * upstream[row]).sum().backward()  # type: ignore[union-attr]
            found.append([parameter.grad for adapter in adapters.values() for parameter in adapter.parameters()])
        for one, other in zip(*found, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-10, atol=1e-12)
        gradient = adapters["a"].magnitude.grad  # type: ignore[union-attr]
        assert gradient is None or gradient[5] == 0
