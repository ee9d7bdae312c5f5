"""Whole layers by way of Triton's programs, which the interpreter runs on a processor: the numbers of the plain path,
and the gradients of the plain formula."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sampling
import trimtab
from trimtab import bases
from trimtab.ops import kernels, ratio as ops_ratio, reference
from trimtab.ops.dropout import Seeded
from trimtab.ops.frozen_linear import frozen_linear
from trimtab.ops.kernels.contract import BackwardPass, Thin
from trimtab.ops.linear_map import MATRIX
from trimtab.ops.low_rank import LowRank, squared_norms
from trimtab.ops.ratio import ratio_of
from trimtab.ops.square import Square

pytest.importorskip("trimtab.ops.kernels.triton", reason="triton is not installed", exc_type=ImportError)
from trimtab.ops.kernels import triton, triton_dropout, triton_segments, triton_square

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 5},
    "dora": {"method": "dora", "rank": 5},
    "dora, exact": {"method": "dora", "rank": 5, "detach_norm": False},
    "dora, kept": {"method": "dora", "rank": 5, "keep_product": True},
    "magnitude": {"method": "lora", "rank": 0, "magnitude": True},
    "dora, bias": {"method": "dora", "rank": 4, "bias": True},
    "dora, by columns": {"method": "dora", "rank": 4, "magnitude_axis": "input"},
    "dora, folded": {"method": "dora", "rank": 4, "compute": "folded"},
    "mora": {"method": "mora", "rank": 4},
    "mora, magnitude": {"method": "mora", "rank": 4, "magnitude": True},
    "mora, sharing": {"method": "mora", "rank": 4, "form": "sharing", "magnitude": True},
}


@pytest.fixture(autouse=True)
def _unfused() -> Iterator[None]:
    assert triton.INTERPRETED
    yield
    assert kernels.kernels_for(torch.zeros(1, 1)) is not triton


def model(dtype: torch.dtype, quantised: str | None = None) -> nn.Sequential:
    """Two layers, wide to narrow, neither a multiple of a block."""
    first, last = nn.Linear(72, 200, dtype=dtype), nn.Linear(200, 72, bias=False, dtype=dtype)
    layers = nn.Sequential(first, nn.Tanh(), last)
    if quantised is not None:
        for place in (0, 2):
            base = bases.find(layers[place])
            assert base is not None
            layers[place] = bases.quantise(base, quantised, dtype)
    return layers


def step(layers: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    output = layers(x)
    (output.float() * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    grads = {name: one.grad for name, one in layers.named_parameters() if one.requires_grad and one.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad, **grads}


def trained(layers: nn.Module, rule: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trimtab.attach(layers, trimtab.Plan(rules=[trimtab.Rule(match="*", **rule)]))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(layers).values():
            parameter.add_(0.1 * parameter.abs().mean().clamp_min(0.2) * torch.randn_like(parameter))
    return layers


def assert_same(layers: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """The fused path, which looks at no values as on a GPU, gives what the plain one does, which does."""
    x = torch.randn(shape).to(dtype)
    other = copy.deepcopy(layers)
    with kernels.using("plain"):
        want = step(layers, x)
    with kernels.using("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops_ratio, "_may_be_read", lambda norm: False)
        got = step(other, x)
    assert got.keys() == want.keys()
    for name, one in want.items():
        assert got[name].dtype == one.dtype, name
        distance = float((got[name].double() - one.double()).norm() / one.double().norm().clamp_min(1e-30))
        assert distance < tolerance, (name, distance)


# float64 shows the formula; of the two others, by which sums and results are kept, each method takes one.
@pytest.mark.parametrize("method", METHODS)
def test_layers_give_the_numbers_of_the_plain_path(method: str) -> None:
    others = [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)]
    place = list(METHODS).index(method) % 4  # every fourth method in float32, every fourth in bfloat16
    for dtype, tolerance in ((torch.float64, 1e-12), *(others if sampling.everything else others[place : place + 1])):
        layers = trained(model(dtype), METHODS[method])
        assert_same(layers, (2, 21, 72), dtype, tolerance)


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = super().forward(super().forward(x))
        return again


@pytest.mark.parametrize("compute", ["folded", "factored"])
@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
def test_a_layer_can_be_used_twice_in_a_pass(method: str, compute: str) -> None:
    """No pass writes over a weight, or seems to, which another one keeps."""
    layers = trained(Twice(nn.Linear(24, 24)).double(), {"method": method, "rank": 3, "compute": compute})
    assert_same(layers, (2, 21, 24), torch.float64, 1e-12)


@pytest.mark.parametrize("shape", [(1, 72), (0, 72), (3, 1, 72), (140, 72)])
def test_any_number_of_tokens(shape: tuple[int, ...]) -> None:
    assert_same(trained(model(torch.float32), METHODS["dora"]), shape, torch.float32, 3e-6)


@pytest.mark.parametrize("quantised", ["int8", "nf4"])
def test_quantised_weights_take_the_same_path(quantised: str) -> None:
    pytest.importorskip("bitsandbytes")
    layers = model(torch.float32, quantised)
    assert type(bases.find(layers[0])).__name__.lower() == f"{quantised}base"
    assert_same(trained(layers, METHODS["dora"]), (2, 20, 72), torch.float32, 3e-6)


@pytest.mark.parametrize("magnitude", [False, True])
def test_gradients_are_those_of_finite_differences(magnitude: bool) -> None:
    weight, update = torch.randn(9, 7).double(), LowRank(0.6)
    a, b, x = (torch.randn(*shape).double().requires_grad_() for shape in ((3, 7), (9, 3), (5, 7)))
    m, n = torch.linspace(0.5, 4, 9).double().requires_grad_(), torch.linspace(1, 2, 9).double()

    def layer(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        given = {"magnitude": m, "norm": n} if magnitude else {}
        return frozen_linear(x, weight, update=update, tensors=(a, b), compute="factored", **given)

    with kernels.using("triton"):
        assert torch.autograd.gradcheck(layer, (x, a, b, m), fast_mode=True)


def test_upstream_gradients_may_lie_in_any_way() -> None:
    layers = trained(model(torch.float32), METHODS["dora"])
    x = torch.randn(6, 72)
    for weigh in (lambda y: y.sum(), lambda y: (y.t().contiguous() * torch.randn(72, 6)).sum()):
        found = []
        for name in ("plain", "triton"):
            layers.zero_grad()
            torch.manual_seed(0)
            with kernels.using(name):
                weigh(layers(x)).backward()
            found.append([one.grad.clone() for one in layers.parameters() if one.grad is not None])
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_step_repeats_bit_for_bit() -> None:
    layers, x = trained(model(torch.float32), METHODS["dora"]), torch.randn(300, 72)
    with kernels.using("triton"):
        first, second = step(copy.deepcopy(layers), x), step(copy.deepcopy(layers), x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointed_layers_and_autocast() -> None:
    layers = trained(model(torch.float32), METHODS["dora"])
    x = torch.randn(20, 72)
    found = []
    for name in ("plain", "triton"):
        layers.zero_grad()
        with kernels.using(name), torch.autocast("cpu", dtype=torch.bfloat16):
            output = torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False)
            output.float().square().sum().backward()
        found.append(torch.cat([one.grad.flatten() for one in layers.parameters() if one.grad is not None]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 2e-2


def test_the_passes_are_single_operations_for_tensors_without_numbers() -> None:
    with kernels.using("triton"), FakeTensorMode():
        x, weight, a, b, m = (
            torch.empty(*size, requires_grad=True) for size in ((3, 5, 7), (9, 7), (2, 7), (9, 2), (9,))
        )
        given = {"magnitude": m, "norm": torch.empty(9), "compute": "factored"}
        counted = CountedOperations()
        with counted:
            output = frozen_linear(x, weight.detach(), update=LowRank(0.5), tensors=(a, b), **given)
            output.sum().backward()
    assert counted.seen["trimtab::forward_pass"] == counted.seen["trimtab::backward_pass"] == 1
    for one in (x, a, b, m):
        assert one.grad is not None
        assert (one.grad.shape, one.grad.dtype) == (one.shape, one.dtype)


def operations_of(run: Callable[[], Any]) -> dict[str, int]:
    """How often each program is started by what is run on tensors without numbers, as they would be on a GPU."""
    with kernels.using("triton"), CountedOperations() as counted:
        run()
    return {name.removeprefix("trimtab::"): n for name, n in counted.seen.items() if name.startswith("trimtab::")}


@pytest.mark.parametrize("turn", [False, True])
def test_a_square_update_is_gathered_and_spread_by_the_programs(turn: bool) -> None:
    with FakeTensorMode():
        x, weight, matrix = (torch.empty(*size, requires_grad=True) for size in ((5, 7), (9, 7), (4, 4)))
        square, squares = Square(7, 9, 4, turn=turn), torch.empty(9)

        def step() -> None:
            frozen_linear(x, weight.detach(), update=square, tensors=(matrix,), compute="factored").sum().backward()

        def norms(matrix: Tensor) -> Tensor:
            return square.squared_norms(weight.detach(), squares, matrix)

        assert operations_of(step) == {"compress": 3, "forward_pass": 1, "add_expanded": 1}
        assert operations_of(lambda: norms(matrix.detach())) == {"square_norms": 1}
        assert operations_of(torch.no_grad()(lambda: norms(matrix))) == {"square_norms": 1}
        assert operations_of(lambda: norms(matrix)) == {}, "they have no gradient"


def test_a_low_rank_update_is_added_folded_and_measured_by_the_programs() -> None:
    with FakeTensorMode():
        x, weight, a, b, m = (
            torch.empty(*size, requires_grad=True) for size in ((5, 7), (40, 7), (2, 7), (40, 2), (40,))
        )
        update, norm, frozen = LowRank(0.5), torch.empty(40), weight.detach()

        def step(keep: Seeded | None = None) -> None:
            given: dict[str, Any] = {"update": update, "tensors": (a, b), "magnitude": m, "norm": norm}
            frozen_linear(x, frozen, keep=keep, compute="factored", **given).sum().backward()

        def norms(a: Tensor, b: Tensor) -> Tensor:
            return squared_norms(frozen, norm, a, b, scale=0.5, axis="output")

        passes = {"quotients": 1, "forward_pass": 1, "backward_pass": 1}
        dropped = {"dropped_product": 1, "add_dropped": 1, "dropped_outer": 1}
        assert operations_of(step) == passes
        assert operations_of(lambda: step(Seeded(torch.empty(1, dtype=torch.int64), 5))) == passes | dropped
        assert operations_of(lambda: update.fold(frozen, None, (a.detach(), b.detach()))) == {"fold": 1}
        assert operations_of(lambda: norms(a.detach(), b.detach())) == {"squared_norms": 1}
        assert operations_of(torch.no_grad()(lambda: norms(a, b))) == {"squared_norms": 1}
        for one, other in ((a, b.detach()), (a.detach(), b)):
            assert operations_of(lambda one=one, other=other: norms(one, other)) == {}, "they have no gradient"


@pytest.mark.parametrize("turn", [False, True])
def test_norms_of_squares_that_the_programs_refuse_are_torchs(turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_square, "takes", lambda *_: False)
    square, weight, matrix = Square(7, 9, 4, turn=turn), torch.randn(9, 7).double(), torch.randn(4, 4).double()
    want = (weight + reference.square_delta(matrix, (9, 7), turn=turn)).square().sum(1)
    with kernels.using("triton"):
        torch.testing.assert_close(square.squared_norms(weight, weight.square().sum(1), matrix), want)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # when no angles are kept
    torch.testing.assert_close(square.squared_norms(weight, weight.square().sum(1), matrix), want)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_an_accelerator_gets_the_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: str) -> list[Any]:
        with FakeTensorMode():
            matrix, norm = torch.empty(4, 3, device=device), torch.empty(4, device=device)
        return [kernels.turning_for(matrix), kernels.segments_for(matrix), kernels.dropping_for(matrix),
                kernels.quotients_for(norm)]  # fmt: skip

    every, none = [triton_square, triton_segments, triton_dropout, triton.quotients], [None] * 4
    assert chosen(device) == every
    assert chosen("cpu") == none
    with kernels.using("triton"):
        assert chosen("cpu") == every
    with kernels.using("plain"):
        assert chosen(device) == none
    with FakeTensorMode():
        matrix, channels = torch.empty(4, 3, device=device), torch.empty(2, 4, 3, device=device)
    assert kernels.kernels_for(matrix) is triton
    assert (kernels.turning_for(channels), kernels.segments_for(channels)) == (None, None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(device)[3] is None, "a compiler makes one program of them itself"


class CountedOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_compiled_layers_give_the_same() -> None:
    layers = trained(model(torch.float32), METHODS["dora"])
    with kernels.using("triton"):
        assert_equal_steps(layers, torch.compile(copy.deepcopy(layers), fullgraph=True, backend="aot_eager"))


def assert_equal_steps(layers: nn.Module, compiled: Any) -> None:
    x = torch.randn(20, 72)
    want, got = step(layers, x), step(compiled, x)
    for name, one in want.items():
        torch.testing.assert_close(
            got[name.replace("0.", "0.")] if name in got else got[f"_orig_mod.{name}"], one, rtol=1e-5, atol=1e-5
        )


def test_a_set_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="'plain' or 'triton'"), kernels.using("cuda"):
        pass


def test_a_set_that_does_not_work_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_works", {"triton": False})
    with pytest.raises(RuntimeError, match="install a triton that fits this torch"), kernels.using("triton"):
        pass


def test_a_triton_that_cannot_be_imported_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(kernels, "import_module", broken)
    monkeypatch.setattr(kernels, "_works", {})
    with pytest.warns(trimtab.TrimtabWarning, match=r"libcuda\.so\.1.*[Ii]nstall the triton"):
        assert not kernels._imports("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels._imports("triton")


def test_what_the_programs_were_not_checked_in_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(triton, "call", never)
    product, ratio = torch.randn(8, 6).t(), ratio_of(torch.ones(8), torch.ones(8), torch.float32)
    got = triton.forward(
        product.clone(memory_format=torch.preserve_format), thin=None, ratio=ratio, bias=None, in_place=False
    )
    torch.testing.assert_close(got, product)


def test_magnitudes_of_zero_and_rows_of_zeros_keep_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where nobody looks at the values: the output is the witness all the same."""
    magnitude, norm = torch.tensor([0.0, 2.0, 3.0, -1.0]), torch.tensor([2.0, 0.0, 3.0, 0.5])
    monkeypatch.setattr(ops_ratio, "_may_be_read", lambda norm: False)
    ratio = ratio_of(magnitude, norm, torch.bfloat16)
    fused = ratio_of(magnitude, norm, torch.bfloat16, triton.quotients)
    torch.testing.assert_close(fused, ratio, rtol=1e-6, atol=0.0)
    assert fused.values[1] == 0
    assert ratio.divisor is not None
    weight = torch.randn(4, 5) * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None]
    x, dy = torch.randn(9, 5).double(), torch.randn(9, 4).double()
    product = x @ weight.double().t()
    output = product * ratio.values.double()
    assert torch.equal(ratio.values[1:], torch.tensor([0.0, 1.0, -2.0]))
    assert 0 < float(ratio.values[0]) < 1e-12
    got = (dy * output).sum(0) / ratio.divisor.double()
    torch.testing.assert_close(got, (dy * product).sum(0) / norm.clamp_min(1e-30), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 65, 140, 512])
def test_ranks_of_any_size_whose_factors_may_be_views(rank: int) -> None:
    inner, b = torch.randn(rank, 20).t(), torch.randn(rank, 40).t()
    product = torch.randn(20, 40)
    want = product + 0.5 * inner @ b.t()
    thin = Thin(inner, b, 0.5)
    torch.testing.assert_close(
        triton.forward(product, thin=thin, ratio=None, bias=None, in_place=True), want, rtol=1e-5, atol=1e-5
    )
    grad = torch.randn(20, 40)
    got = triton.backward(grad, thin=thin, ratio=None, witness=None, wants_bias=False, wants_scaled=True)
    torch.testing.assert_close(got.inner, 0.5 * grad @ b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.b, 0.5 * grad.t() @ inner, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize(("shape", "side"), [((30, 70), 16), ((70, 30), 16), ((33, 33), 40), ((50, 50), 6)])
def test_squares_are_the_formulas(shape: tuple[int, int], side: int, turn: bool) -> None:
    """MoRA's product, its gradients and its norms, where chunks and blocks are cut off in every way."""
    square = Square(shape[1], shape[0], side, turn=turn)
    matrix, weight = torch.randn(side, side).double(), torch.randn(shape).double()
    delta = reference.square_delta(matrix, shape, turn=turn)
    rows, grad = torch.randn(19, shape[1]).double(), torch.randn(19, shape[0]).double()
    with kernels.using("triton"):
        product = torch.zeros(19, shape[0]).double()
        square.add_product(product, rows, (matrix,), MATRIX)
        grad_rows = torch.ones_like(rows)
        (grad_matrix,) = square.add_gradient(grad_rows, BackwardPass(grad), rows, (matrix,), MATRIX)
        norms = square.squared_norms(weight, weight.square().sum(1), matrix)
    torch.testing.assert_close(product, rows @ delta.t(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_rows, 1 + grad @ delta, rtol=1e-10, atol=1e-10)
    want = reference.square_gradient(grad.t() @ rows, side, turn=turn)
    torch.testing.assert_close(grad_matrix, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norms, (weight + delta).square().sum(1), rtol=1e-10, atol=1e-10)
