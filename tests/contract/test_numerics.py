"""The numerics where they are hard: rows of zeros, magnitudes far from their norms, updates too small for half
precision, outputs changed in place, biases larger than what they are added to, models cast to another dtype.

Tolerances as in ``test_contract``, in units of the dtype in which the product runs, unless a test says otherwise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sampling
import trimtab
from contract_cases import DTYPES, SHAPES, Case, Holder, Reference, assert_close, cases, cases_with, each_once, stir
from trimtab import methods

EPS = torch.finfo(torch.float32).eps
DECOMPOSED = cases(DTYPES[:3], SHAPES[2:], magnitude=True, dropout=0.0)
BY_OUTPUT = cases(DTYPES[:3], SHAPES[2:], magnitude=True, dropout=0.0, magnitude_axis="output", keep_product=False)
FAR = {"far": [(0.51, 1.49), (0.0, 0.01, 3.0, -1.0)]}
BF16 = torch.bfloat16


def compare(model: Holder, case: Case, tolerance: float, x: Tensor, upstream: Tensor) -> None:
    """Output and all gradients of the library against the plain formula."""
    plain = Reference(model.adapted, case)
    leaf, leaf64 = x.clone().requires_grad_(), x.double().requires_grad_()
    output, expected = model(leaf), plain(leaf64)
    assert_close(output, expected, tolerance, "output")
    output.backward(upstream)
    expected.backward(upstream.double())
    assert leaf.grad is not None
    assert leaf64.grad is not None
    assert_close(leaf.grad, leaf64.grad, 2 * tolerance, "gradient of the input")
    for name, parameter in model.adapted.adapter.named_parameters():
        want = plain.tensors[name].grad
        assert parameter.grad is not None, name
        assert want is not None, name
        assert_close(parameter.grad, want, 2 * tolerance, f"gradient of {name}")


# Rows of zeros -----------------------------------------------------------------------------------------------------


def holed(case: Case, everything: bool = False) -> tuple[Holder, list[int], trimtab.AttachReport]:
    """A layer in which some rows (or columns, for magnitudes per input) are zero, freshly attached."""
    holes = [0, 4, 5]

    def dig(weight: Tensor) -> None:
        if everything:
            weight.zero_()
        elif case.axis == "output":
            weight[holes] = 0
        else:
            weight[:, holes] = 0

    model = case.bare(dig)
    report = trimtab.attach(model, trimtab.Rule(match="layer", method=case.method, **case.said))
    return model, holes, report


@pytest.mark.parametrize("case", each_once(DECOMPOSED), ids=str)
def test_zero_rows_stay_zero_and_untrained(case: Case) -> None:
    model, holes, report = holed(case)
    assert report.zero_rows == {"layer": 3}
    assert report.counts["zero_rows"] == 3
    magnitude = model.adapted.adapter.magnitude
    assert magnitude is not None
    x = case.input().requires_grad_()
    output = model(x)
    output.backward(torch.randn_like(output))
    assert bool(output.isfinite().all())
    assert magnitude.grad is not None
    assert not magnitude.grad[holes].any(), "no gradient reaches the magnitude of a row of zeros"
    assert bool((magnitude.grad != 0).sum() == len(magnitude) - 3)
    for name, parameter in model.adapted.adapter.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all()), name
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    if case.axis == "output":
        bias = model.adapted.bias
        dead = torch.zeros_like(output) if bias is None else bias.expand_as(output)
        assert torch.equal(output[:, holes], dead[:, holes]), "the output of such a row is its bias"
    else:
        assert not x.grad[:, holes].any(), "an input column of zeros passes no gradient on"
    weight = trimtab.effective_weight(model, "layer")
    assert not (weight[holes] if case.axis == "output" else weight[:, holes]).any()


@pytest.mark.parametrize("method", ["lora", "mora"])
@pytest.mark.parametrize("detach_norm", [True, False])
def test_a_zero_row_takes_no_part_whatever_its_magnitude(method: str, detach_norm: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[2] = 0
    rule = trimtab.Rule(match="0", method=method, rank=1, magnitude=True, detach_norm=detach_norm)
    trimtab.attach(model, rule)
    with torch.no_grad():
        model[0].adapter.magnitude[2] = 3.0
    x = torch.randn(5, 6, requires_grad=True)
    model(x)[:, 2].sum().backward()
    for tensor in (x, *trimtab.trainable_parameters(model).values()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("case", each_once(DECOMPOSED), ids=str)
def test_a_layer_of_zeros_gives_no_nan(case: Case) -> None:
    model, _, report = holed(case, everything=True)
    assert report.zero_rows == {"layer": case.shape[0] if case.axis == "output" else case.shape[1]}
    for _ in range(2):
        output = model(case.input())
        bias = model.adapted.bias
        assert torch.equal(output, torch.zeros_like(output) if bias is None else bias.expand_as(output))
        output.float().square().sum().backward()
        for name, parameter in model.adapted.adapter.named_parameters():
            assert parameter.grad is not None
            # 0 and not NaN: nothing but a bias can learn until a row becomes nonzero.
            assert name == "bias" or not parameter.grad.any(), name
        torch.optim.SGD(trimtab.trainable_parameters(model).values(), lr=0.1).step()
    trimtab.merge(model)
    assert not model.layer.weight.any()


@pytest.mark.parametrize("case", [case for case in DECOMPOSED if case.said.get("rank", 2)], ids=str)
def test_a_zero_row_that_becomes_nonzero_trains_again(case: Case) -> None:
    """The update fills the holes: their magnitudes are still 0, and now get the gradient of the formula."""
    model, holes, _ = holed(case)
    with torch.no_grad():
        for name, parameter in model.adapted.adapter.named_parameters():
            if name != "magnitude":
                parameter.add_(0.1 * torch.randn_like(parameter))
    upstream = torch.randn(7, case.shape[0]).to(case.dtype)
    compare(model, case, 3 * case.eps, case.input(), upstream)
    magnitude = model.adapted.adapter.magnitude
    assert magnitude is not None
    assert magnitude.grad is not None
    assert bool(magnitude.grad[holes].all())


# Magnitudes far from the norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "far"), cases_with(FAR, DTYPES[:2], SHAPES[2:], magnitude=True, dropout=0.0), ids=str)
def test_magnitudes_far_from_the_norm(case: Case, far: tuple[float, ...]) -> None:
    """Zero, small, large and negative ratios beside ordinary ones; 0.51 and 1.49 are near the edge of what is read
    off the output."""
    model = case.trained()
    adapter = model.adapted.adapter
    assert adapter.magnitude is not None
    with torch.no_grad():
        norms = adapter.norm(model.adapted.handle.weight(), model.adapted.handle)
        adapter.magnitude.copy_(norms * (0.9 + 0.2 * torch.rand_like(norms)))
        for place, ratio in enumerate(far):
            adapter.magnitude[place::6] = ratio * norms[place::6]
    compare(model, case, 3 * case.eps, case.input(), torch.randn(7, case.shape[0]).to(case.dtype))


@pytest.mark.parametrize("case", each_once(BY_OUTPUT), ids=str)
def test_keep_product_gives_the_same_gradients(case: Case) -> None:
    seen = []
    for keep in (False, True):
        options = {**case.said, "keep_product": keep}
        model = Case(case.method, tuple(options.items()), case.base, case.bias, case.dtype, case.shape).trained()
        output = model(case.input())
        output.backward(torch.randn_like(output))
        seen.append({name: parameter.grad for name, parameter in trimtab.trainable_parameters(model).items()})
    for name, value in seen[0].items():
        want = seen[1][name]
        assert value is not None
        assert want is not None
        assert_close(value, want, 6 * case.eps, name)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_larger_than_the_product(dtype: torch.dtype, size: float) -> None:
    """The gradient of the magnitude does not drown in the rounding of ``product + bias``: a bfloat16 1000 leaves no
    digit of a product of 1. In bfloat16 one unit is enough, since 256 tokens average. In float32 the gradient is a
    difference of two sums that the bias dominates, each a few units off after 256 additions."""
    case = Case("dora", (("rank", 2),), "linear", True, dtype, (13, 17))
    model = case.bare()
    with torch.no_grad():
        model.layer.bias.copy_(size * torch.randn(13))
    trimtab.attach(model, trimtab.Rule(match="layer", method="dora", rank=2))
    stir(model, 0.02)
    x, upstream = case.input(256), (torch.randn(256, 13) + 1).to(dtype)
    plain = Reference(model.adapted, case)
    model(x).backward(upstream)
    plain(x).backward(upstream.double())
    magnitude = model.adapted.adapter.magnitude
    assert magnitude is not None
    assert magnitude.grad is not None
    assert plain.magnitude is not None
    assert plain.magnitude.grad is not None
    want = plain.magnitude.grad
    error = (magnitude.grad.double() - want).abs()
    bound = case.eps * want.abs().max()
    if dtype == torch.float32:
        assert plain.bias is not None
        bound = 8 * bound + 4 * case.eps * plain.bias.abs() * upstream.double().abs().sum(0)
    assert bool((error <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", methods.names("weight"))
def test_an_activation_in_place(method: str, bias: bool, dtype: torch.dtype) -> None:
    """The magnitude's gradient is read off the output, unless that was changed: then off the product, which is computed
    again, or with ``keep_product`` kept."""
    said = {"rank": 2} if "rank" in methods.options_class(method).model_fields else {}
    decomposed = said if method == "dora" else {**said, "magnitude": True}
    for keep in (False, True):
        case = Case(method, (*decomposed.items(), ("keep_product", keep)), "linear", bias, dtype, (13, 17))
        model = case.trained()
        x = case.input()
        plain = Reference(model.adapted, case)
        upstream = torch.randn(7, 13).to(dtype)
        output = nn.ReLU(inplace=True)(model(x))
        output.backward(upstream)
        # Where a rounded output falls on the other side of 0 the two would differ: the same rows for both.
        plain(x).backward(upstream.double() * (output > 0))
        for name, parameter in model.adapted.adapter.named_parameters():
            want = plain.tensors[name].grad
            assert parameter.grad is not None
            assert want is not None
            assert_close(parameter.grad, want, 6 * case.eps, name)


# Small updates on a half-precision base -----------------------------------------------------------------------------

LARGE = (96, 160)
SMALL_CASES = [
    Case(method, tuple(options.items()), base, True, dtype, LARGE)
    for method, options in [
        ("dora", {"rank": 4}),
        ("dora", {"rank": 4, "detach_norm": False}),
        ("dora", {"rank": 4, "magnitude_axis": "input"}),
        ("mora", {"rank": 4, "magnitude": True}),
        ("mora", {"rank": 4, "magnitude": True, "form": "sharing"}),
    ]
    for base in ("linear", "conv1d")
    for dtype in (torch.bfloat16, torch.float16)
]


def share(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||``."""
    return ((got.detach().double() - want.detach()).norm() / want.detach().norm()).item()


def with_small_update(case: Case, relative: float) -> tuple[Holder, Reference]:
    """An update whose norm is ``relative`` times that of the weight, in float32, on a half-precision base."""
    model = case.fresh()
    adapter = model.adapted.adapter
    with torch.no_grad():
        last = adapter.get_parameter("M" if case.method == "mora" else "B")
        last.normal_()
        plain = Reference(model.adapted, case)
        last.mul_(relative * plain.weight.norm() / plain.update().norm())
    return model, Reference(model.adapted, case)


SMALL = [(case, relative) for case in SMALL_CASES for relative in (1e-5, 1e-4, 1e-3)]
small_updates = pytest.mark.parametrize(("case", "relative"), sampling.sample(SMALL, 2), ids=str)


@small_updates
def test_small_updates_move_the_norm(case: Case, relative: float) -> None:
    """The change of the norm, to 1 %, beyond what float32 can hold of the norm itself (half a unit for the square,
    the root and the magnitude each). In bfloat16 the norm would be off by thousands of float32 units."""
    model, plain = with_small_update(case, relative)
    adapter, handle = model.adapted.adapter, model.adapted.handle
    weight = handle.weight()
    dim = 1 if case.axis == "output" else 0
    norms = plain.weight.norm(dim=dim)
    change = (plain.weight + plain.update()).norm(dim=dim).detach() - norms
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = adapter.norm(weight, handle).detach().double() - norms
            error = (got - change).norm()
            assert error <= 0.01 * change.norm() + 1.5 * EPS * norms.norm()
            ratio = adapter.ratio(weight, handle)
            assert ratio is not None
            expected = norms / (norms + change) - 1
            error = (ratio.detach().double() - 1 - expected).norm()
            assert error <= 0.01 * expected.norm() + 2 * EPS * len(norms) ** 0.5


def test_a_small_update_along_the_rows_moves_the_norm() -> None:
    """``B A`` parallel to the rows of W, so that the norm moves by 1e-5 of itself, which float32 holds to 1 %."""
    layer = nn.Linear(160, 96).bfloat16()
    direction = torch.randn(160)
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.rand(96) + 0.5, direction))
    model = nn.Sequential(layer)
    trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=1, alpha=1))
    adapter = model[0].adapter
    with torch.no_grad():
        adapter.A.copy_(direction)
        adapter.B.fill_(1e-5)
    norms = layer.weight.double().norm(dim=1)
    exact = (layer.weight.double() + adapter.B.double() @ adapter.A.double()).norm(dim=1) - norms
    got = adapter.norm(layer.weight, model[0].handle).double() - norms
    assert bool(((got - exact).abs() <= 0.02 * exact.abs()).all())


@small_updates
def test_small_updates_keep_their_gradients(case: Case, relative: float) -> None:
    """To 1 % in bfloat16: A, B, M and the gradient coming in are each rounded to 0.4 % at most once on the way, and
    the errors of many elements average."""
    model, plain = with_small_update(case, relative)
    x = case.input(64)
    upstream = torch.randn(64, LARGE[0]).to(case.dtype)
    model(x).backward(upstream)
    plain(x).backward(upstream.double())
    for name, parameter in model.adapted.adapter.named_parameters():
        want = plain.tensors[name].grad
        assert parameter.grad is not None
        assert want is not None
        assert share(parameter.grad, want) < 0.01, name


@small_updates
def test_small_updates_show_in_the_effective_weight(case: Case, relative: float) -> None:
    model, plain = with_small_update(case, relative)
    change = plain.effective().detach() - plain.weight
    got = trimtab.effective_weight(model, "layer").double() - plain.weight
    assert (got - change).norm() <= 0.01 * change.norm() + EPS * plain.weight.norm()


def test_a_ratio_close_to_one_survives_half_precision() -> None:
    """A ratio halfway between two bfloat16 numbers: over many tokens the mean output shows it all the same. A rounded
    copy of the ratio would be off by a third of its distance from 1."""
    excess = 1.5 * 2.0**-7
    case = Case("dora", (("rank", 0),), "linear", False, BF16, (16, 64))
    model = case.fresh()
    x = case.input(4096)
    before = model(x).double()
    magnitude = model.adapted.adapter.magnitude
    assert magnitude is not None
    with torch.no_grad():
        magnitude.mul_(1 + excess)
    ratio = (model(x).double() * before).sum() / before.square().sum()
    assert abs(ratio.item() - 1 - excess) < 0.1 * excess


# Other dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 2, "magnitude_axis": "input"}], ids=str)
def test_a_model_cast_after_attaching(base: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    """Norms of 400 have squares that float16 cannot hold. A model cast to half precision keeps its outputs."""
    case = Case("dora", tuple(options.items()), base, True, torch.float32, (13, 17))
    model = case.bare()
    with torch.no_grad():
        model.layer.weight.mul_(400)
    trimtab.attach(model, trimtab.Rule(match="layer", method="dora", **options))
    stir(model)
    x = case.input().to(dtype)
    expected = model(x.float())
    model.to(dtype)
    # The base and the magnitude are each rounded once more.
    assert_close(model(x), expected, 4 * torch.finfo(dtype).eps)
    assert_close(
        trimtab.effective_weight(model, "layer").float(),
        model.adapted.weight.float().t() if base == "conv1d" else model.adapted.weight.float(),
        torch.finfo(dtype).eps,
    )


@pytest.mark.parametrize("method", methods.names("weight"))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("base", ["linear", "convolution"])
def test_adapters_in_half_precision(method: str, dtype: str, base: str) -> None:
    """``dtype`` stores the trained tensors in half precision; what they do is still computed in full digits from what
    is stored."""
    fields = methods.options_class(method).model_fields
    said = {name: value for name, value in {"rank": 2, "alpha": 5.0}.items() if name in fields}
    said = said if method == "dora" else {**said, "magnitude": True}
    case = Case(method, (*said.items(), ("dtype", dtype)), base, True, torch.float32, (12, 20))
    model = case.trained()
    assert {str(p.dtype) for p in trimtab.trainable_parameters(model).values()} == {f"torch.{dtype}"}
    plain = Reference(model.adapted, case)
    assert_close(trimtab.effective_weight(model, "layer"), plain.effective().detach(), 4 * EPS)
    x = case.input().requires_grad_()
    output, expected = model(x), plain(x)
    assert_close(output, expected, 16 * EPS, "output")
    upstream = torch.randn_like(output)
    got, want = torch.autograd.grad(output, x, upstream), torch.autograd.grad(expected, x, upstream.double())
    assert_close(got[0], want[0], 16 * EPS, "gradient of the input")
    trimtab.merge(model)
    assert_close(model.layer.weight.flatten(1), plain.effective().detach(), EPS)


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_dropout_before_an_adapter_in_half_precision(method: str) -> None:
    """Its factor is not rounded to the digits of what is trained: what is kept goes through the update as it is."""
    model = Case(
        method, (("rank", 2), ("dropout", 0.4), ("dtype", "bfloat16")), "linear", True, torch.float32, (12, 20)
    ).fresh()
    stir(model)
    adapter, x = model.adapted.adapter, torch.eye(20)
    drawn = adapter.draw(x)
    assert drawn is not None
    adapter.__dict__["draw"] = lambda _: drawn
    kept = drawn.of(x).double().diagonal() * drawn.scale
    handle: Any = model.adapted.handle
    delta = trimtab.effective_weight(model, "layer").double() - handle.weight().double()
    assert_close(
        model.train()(x) - model.eval()(torch.zeros(20)), (handle.weight().double() + delta * kept).t(), 16 * EPS
    )
