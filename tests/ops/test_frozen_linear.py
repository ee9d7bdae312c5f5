"""The one autograd function of the product: finite differences, what it keeps for the backward pass, and digits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pairwise
import plain_formula
import sampling
from trimtab.ops.cost import Compute
from trimtab.ops.dropout import Keep
from trimtab.ops.frozen_linear import frozen_linear
from trimtab.ops.low_rank import LowRank
from trimtab.ops.square import Square
from trimtab.ops.update import Update

OUT, IN = 5, 7
UPDATES: dict[str, tuple[Update | None, list[tuple[int, int]]]] = {
    "none": (None, []),
    "low rank": (LowRank(1.7), [(2, IN), (OUT, 2)]),
    "rotation": (Square(IN, OUT, 4, turn=True), [(4, 4)]),
    "sharing": (Square(IN, OUT, 3, turn=False), [(3, 3)]),
}
PLAIN: dict[str, Callable[..., Tensor]] = {
    "low rank": lambda a, b: plain_formula.low_rank(a, b, {"alpha": 1.7 * a.shape[0]}),
    "rotation": lambda m: plain_formula.square_rotation(m, (OUT, IN)),
    "sharing": lambda m: plain_formula.square_sharing(m, (OUT, IN)),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


FACTORS: dict[str, list[Any]] = {
    "update": list(UPDATES),
    "bias": [False, True],
    "scale": [None, "near one", "far from one"],
    "keep": [False, True],
    "drop": [False, True],
    "compute": ["folded", "factored"],
}
PAIRS = [tuple(row.values()) for row in pairwise.cover(FACTORS)]
COMBINATIONS = sampling.sample(list(itertools.product(*FACTORS.values())), 3, PAIRS)


@pytest.mark.parametrize(tuple(FACTORS), COMBINATIONS)
def test_finite_differences(
    update: str, bias: bool, scale: str | None, keep: bool, drop: bool, compute: Compute
) -> None:
    """Every gradient, those of the bias and the norm included, in float64, with and without dropout."""
    kind, shapes = UPDATES[update]
    weight = draw(OUT, IN).detach()
    optional = {
        "bias": draw(OUT) if bias else None,
        "magnitude": None if scale is None else (2 + (0.2 if scale == "near one" else 4.0) * draw(OUT)).detach(),
        "norm": None if scale is None else torch.full((OUT,), 2.0, dtype=torch.float64),
    }
    given = {name: value.requires_grad_() for name, value in optional.items() if value is not None}
    tensors = [draw(*shape) for shape in shapes]
    dropping = Keep(-(draw(2, 3, IN) > 0).to(torch.int8), 1.7) if drop else None

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        named = dict(zip(given, rest, strict=False))
        return frozen_linear(
            x,
            weight,
            update=kind,
            tensors=rest[len(given) :],
            keep=dropping,
            keep_product=keep,
            compute=compute,
            **named,
        )

    assert torch.autograd.gradcheck(run, (draw(2, 3, IN), *given.values(), *tensors), check_batched_grad=False)


def test_the_weight_gets_no_gradient() -> None:
    weight, x = draw(OUT, IN), draw(3, IN)
    frozen_linear(x, weight).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


def test_a_frozen_input_still_trains_the_update() -> None:
    a, b, magnitude = draw(2, IN), draw(OUT, 2), draw(OUT)
    x, weight, norm = draw(3, IN).detach(), draw(OUT, IN).detach(), torch.ones(OUT, dtype=torch.float64)
    frozen_linear(x, weight, update=LowRank(1.0), tensors=(a, b), magnitude=magnitude, norm=norm).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert magnitude.grad is not None


def test_frozen_tensors_still_pass_the_gradient_on() -> None:
    a, b = draw(2, IN).detach(), draw(OUT, 2).detach()
    weight, x = draw(OUT, IN).detach(), draw(3, IN)
    frozen_linear(x, weight, update=LowRank(3.0), tensors=(a, b)).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, (weight + 3 * b @ a).sum(0).expand(3, -1))


@pytest.mark.parametrize(
    ("change", "read_off"),
    [
        pytest.param({}, True, id="ordinary"),
        pytest.param({"bias": torch.ones(OUT)}, True, id="bias"),
        pytest.param({"bias": torch.ones(OUT), "dtype": torch.bfloat16}, False, id="bias in bfloat16"),
        pytest.param({"dtype": torch.bfloat16}, True, id="bfloat16"),
        pytest.param({"keep_product": True}, False, id="keep_product"),
        pytest.param({"scale": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.6])}, False, id="one far scale"),
        pytest.param({"scale": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])}, False, id="one zero scale"),
        pytest.param({"scale": torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])}, False, id="one NaN"),
    ],
)
def test_when_the_gradient_of_the_scale_is_read_off_the_output(change: dict[str, object], read_off: bool) -> None:
    """Reading it off the output saves keeping the product: true in the ordinary case, and nowhere else."""
    dtype = change.pop("dtype", torch.float32)
    assert isinstance(dtype, torch.dtype)
    bias, scale = change.pop("bias", None), change.pop("scale", torch.full((OUT,), 1.1))
    assert isinstance(scale, Tensor)
    x, weight = torch.randn(4, IN, dtype=dtype), torch.randn(OUT, IN, dtype=dtype)
    given = bias.to(dtype) if isinstance(bias, Tensor) else None
    magnitude, norm = scale.clone().requires_grad_(), torch.ones(OUT)
    output = frozen_linear(x, weight, given, magnitude=magnitude, norm=norm, **change)  # type: ignore[arg-type]
    kept = {tensor.data_ptr() for tensor in output.grad_fn.saved_tensors if tensor is not None}  # type: ignore[union-attr]
    assert (output.data_ptr() in kept) is read_off


@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 2, IN)], ids=str)
@pytest.mark.parametrize("scale", [False, True])
def test_an_operation_in_place_may_follow(shape: tuple[int, ...], scale: bool) -> None:
    x, weight, bias = draw(*shape), draw(OUT, IN).detach(), draw(OUT).detach()
    ratio = torch.full((OUT,), 1.1, dtype=torch.float64, requires_grad=True)
    output = frozen_linear(
        x, weight, bias, magnitude=ratio if scale else None, norm=torch.ones_like(ratio), keep_product=True
    )
    output.mul_(2).relu_().sum().backward()
    got = x.grad
    x.grad = None
    product = F.linear(x, weight)
    (2 * ((product * 1.1 if scale else product) + bias)).relu().sum().backward()
    assert got is not None
    assert x.grad is not None
    assert torch.allclose(got, x.grad)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("compute", ["folded", "factored"])
@pytest.mark.parametrize("update", ["low rank", "rotation"])
def test_an_output_that_was_changed_is_not_read(update: str, compute: Compute, dropped: bool) -> None:
    """The gradients are those that the product gives, which is computed again."""
    kind, shapes = UPDATES[update]
    tensors = tuple(draw(*shape) for shape in shapes)
    x, weight, bias = draw(3, IN), draw(OUT, IN).detach(), draw(OUT)
    magnitude, norm = draw(OUT), torch.ones(OUT, dtype=torch.float64)
    with torch.no_grad():
        magnitude.copy_(torch.linspace(0.8, 1.2, OUT))
    mask = torch.rand(3, IN) > 0.4
    keep = Keep(mask, 2.0) if dropped else None
    leaves = x, bias, magnitude, *tensors
    grads = []
    for kept in (False, True):
        output = frozen_linear(
            x,
            weight,
            bias,
            update=kind,
            tensors=tensors,
            magnitude=magnitude,
            norm=norm,
            keep=keep,
            compute=compute,
            keep_product=kept,
        )
        grads.append(torch.autograd.grad(output.mul_(2).sin().sum(), leaves))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_what_else_was_changed_in_place_keeps_torchs_word() -> None:
    a, b = draw(2, IN), draw(OUT, 2)
    magnitude = torch.ones(OUT, dtype=torch.float64, requires_grad=True)
    output = frozen_linear(
        draw(3, IN),
        draw(OUT, IN).detach(),
        update=LowRank(1.0),
        tensors=(a, b),
        magnitude=magnitude,
        norm=torch.ones(OUT, dtype=torch.float64),
    )
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_operation_in_place_is_refused_where_the_output_is_needed() -> None:
    scale = torch.full((OUT,), 1.1, requires_grad=True)
    output = frozen_linear(torch.randn(4, IN), torch.randn(OUT, IN), magnitude=scale, norm=torch.ones(OUT))
    output.relu_()
    with pytest.raises(RuntimeError, match="keep_product=True") as caught:
        output.sum().backward()
    assert "modified by an inplace operation" in str(caught.value.__cause__)


def test_another_change_in_place_keeps_torchs_word() -> None:
    """Where the output is not needed, torch's own message is the right one."""
    a, b = draw(2, IN), draw(OUT, 2)
    output = frozen_linear(draw(3, IN), draw(OUT, IN).detach(), update=LowRank(1.0), tensors=(a, b))
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        output.sum().backward()
    assert "keep_product" not in str(caught.value)


@pytest.mark.parametrize("update", sampling.sample(list(UPDATES), 2))
def test_torch_compile(update: str) -> None:
    """Traced by the compiler, the function gives the same output and gradients (to the order of sums)."""
    kind, shapes = UPDATES[update]
    tensors = tuple(torch.randn(*shape, requires_grad=True) for shape in shapes)
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    scale, norm = torch.full((OUT,), 1.1, requires_grad=True), torch.ones(OUT)
    x = torch.randn(3, IN, requires_grad=True)

    def run(x: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
        return frozen_linear(x, weight, bias, update=kind, tensors=tensors, magnitude=scale, norm=norm).tanh()

    def walk(function: Callable[..., Tensor]) -> list[Tensor]:
        output = function(x, scale, *tensors)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), (x, scale, *tensors))]

    torch._dynamo.reset()
    for got, want in zip(walk(torch.compile(run, backend="aot_eager")), walk(run), strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_torch_compile_where_no_gradient_is_asked_for() -> None:
    """Outside of training the compiler calls an autograd function of two trailing tensors without its context."""
    x, weight = torch.randn(3, IN), torch.randn(OUT, IN)
    tensors = tuple(torch.randn(*size, requires_grad=True) for size in ((2, IN), (OUT, 2)))
    run = torch.compile(lambda x: frozen_linear(x, weight, update=LowRank(1.0), tensors=tensors), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(run(x), x @ (weight + tensors[1] @ tensors[0]).t(), rtol=1e-5, atol=1e-5)


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that are saved for a backward pass while it is open."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def test_a_frozen_weight_alone_keeps_no_input() -> None:
    """A quantised layer without an adapter: its gradient is ``grad W``, with the weight given again."""
    x, weight = torch.randn(7, 5, requires_grad=True), torch.randn(3, 5)
    with kept_for_backward() as kept:
        output = frozen_linear(x, weight, again=lambda: weight)
    assert kept == []
    output.backward(torch.ones_like(output))
    assert torch.allclose(x.grad, torch.ones(7, 3) @ weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_weight_that_is_given_again_is_multiplied_in_place(dtype: torch.dtype) -> None:
    """No second matrix stands beside it in the backward pass. A weight that the base stores stays as it is."""
    weight, (a, b) = draw(OUT, IN).detach().to(dtype), (draw(*shape).detach() for shape in ((2, IN), (OUT, 2)))
    magnitude = torch.linspace(1.7, 2.4, OUT, dtype=torch.promote_types(dtype, torch.float32))
    norm, upstream, x = torch.full_like(magnitude, 2), torch.randn(64, OUT).to(dtype), torch.randn(64, IN).to(dtype)
    gradients = []
    for given in (None, weight.clone()):
        fed, stored = x.clone().requires_grad_(), weight.clone()
        again = None if given is None else lambda given=given: given
        output = frozen_linear(
            fed,
            stored,
            update=LowRank(0.5),
            tensors=(a, b),
            magnitude=magnitude,
            norm=norm,
            again=again,
            compute="factored",
        )
        output.backward(upstream)
        gradients.append(fed.grad)
        assert torch.equal(stored, weight)
        if given is not None:
            assert torch.allclose(given.double(), weight.double() * (magnitude / 2).double()[:, None], rtol=2**-7)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_is_the_formula_and_keeps_the_input_and_one_byte_an_element(dtype: torch.dtype) -> None:
    """Layers that read one input keep it between them: no copy of what was left of it."""
    weight, x = draw(OUT, IN).detach().to(dtype), draw(64, IN).to(dtype).detach().requires_grad_()
    full_digits = torch.promote_types(dtype, torch.float32)
    a, b = (draw(*shape).detach().to(full_digits).requires_grad_() for shape in ((2, IN), (OUT, 2)))
    mask = draw(64, IN).detach() > 0
    with kept_for_backward() as kept:
        output = frozen_linear(
            x, weight, update=LowRank(3.0), tensors=(a, b), keep=Keep(-mask.to(torch.int8), 1.7), compute="factored"
        )
    large = [tensor for tensor in kept if tensor.numel() == x.numel()]
    assert sorted(tensor.element_size() for tensor in large) == [1, dtype.itemsize]
    assert all(tensor.data_ptr() == x.data_ptr() for tensor in large if tensor.element_size() > 1)

    full = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    wanted = full[0] @ weight.double().t() + 3 * 1.7 * (full[0] * mask) @ full[1].t() @ full[2].t()
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.3}
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else close
    torch.testing.assert_close(output.double(), wanted, **close)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, (x, a, b), upstream)
    for got, want in zip(found, torch.autograd.grad(wanted, full, upstream.double()), strict=True):
        torch.testing.assert_close(got.double(), want, **close)


@pytest.mark.parametrize("update", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_folded_weight_lies_in_memory_as_the_frozen_one(
    update: str, dtype: torch.dtype, scale: bool, transposed: bool
) -> None:
    """What multiplies with it, then, does what it does with the frozen weight."""
    kind, shapes = UPDATES[update]
    assert kind is not None
    weight = (torch.randn(IN, OUT).t() if transposed else torch.randn(OUT, IN)).to(dtype)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    ratio = 1 + torch.rand(OUT, dtype=full) if scale else None
    tensors = tuple(torch.randn(*shape, dtype=full) for shape in shapes)
    got = kind.fold(weight, ratio, tensors)
    assert got.dtype == dtype
    assert got.stride() == weight.stride()
    assert got.data_ptr() != weight.data_ptr()
    plain = PLAIN[update](*(tensor.double() for tensor in tensors))
    exact = weight.double() + plain
    if ratio is not None:
        exact = exact * ratio.double().unsqueeze(1)
    bound = 4 * torch.finfo(dtype).eps * (weight.double().abs() + plain.abs()) * (1 if ratio is None else 2)
    assert bool(((got.double() - exact).abs() <= bound).all())


def test_of_a_frozen_update_the_magnitude_alone_gets_a_gradient() -> None:
    weight, a, b = (draw(*shape).detach() for shape in [(OUT, IN), (2, IN), (OUT, 2)])
    x, magnitude = draw(3, IN).detach(), draw(OUT)
    total = weight + 1.7 * b @ a
    norm, gradient = total.norm(dim=1), torch.randn(3, OUT, dtype=torch.float64)
    output = frozen_linear(x, weight, update=LowRank(1.7), tensors=(a, b), magnitude=magnitude, norm=norm)
    (got,) = torch.autograd.grad(output, magnitude, gradient)
    torch.testing.assert_close(got, (gradient * (x @ total.t())).sum(0) / norm, rtol=1e-12, atol=1e-12)


def test_a_graph_that_is_gone_is_not_taken_for_an_output_changed_in_place() -> None:
    weight = draw(OUT, IN).detach()
    norm = weight.norm(dim=1)
    magnitude = norm.clone().requires_grad_()
    output = frozen_linear(draw(3, IN), weight, magnitude=magnitude, norm=norm).sum()
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()
