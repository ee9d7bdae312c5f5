"""Every method on every kind of base: its gradients in use. They add up, survive checkpointing, autocast and the
compiler, and where a second derivative is not right it is refused.

Where two runs must do the same arithmetic the results are compared bit for bit; otherwise with a few float32 units.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import trimtab
from contract_cases import SHAPES, Case, Reference, assert_close, assert_same, cases, each_once, gradients
from trimtab import methods

EPS = torch.finfo(torch.float32).eps
FULL = cases([torch.float32], SHAPES[2:])
# One kind of base is enough for what only autograd and Python can get wrong.
ONE_BASE = cases([torch.float32], on=["linear", "block"], biased=True)
ONE_EACH = each_once(ONE_BASE)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_gradients_accumulate(case: Case) -> None:
    model = case.trained()
    first, second = case.input(), case.input()
    alone = []
    for x in (first, second):
        model(x).square().sum().backward()
        alone.append(gradients(model))
        model.zero_grad()
    for x in (first, second):
        model(x).square().sum().backward()
    for name, value in gradients(model).items():
        assert torch.equal(value, alone[0][name] + alone[1][name]), name


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_one_graph_walked_twice_gives_the_same_gradients(case: Case) -> None:
    model = case.trained()
    loss = model(case.input()).square().sum()
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    for name, value in gradients(model).items():
        assert torch.equal(value, 2 * once[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("case", ONE_BASE, ids=str)
def test_a_second_derivative_is_right_or_refused(case: Case) -> None:
    model = case.trained()
    plain = Reference(model.adapted, case)
    x = case.input()

    def penalty(output: Tensor, tensors: list[Tensor]) -> Tensor:
        found = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        return torch.stack([one.square().sum() for one in found]).sum()

    named = dict(model.adapted.adapter.named_parameters())
    loss = penalty(model(x), list(named.values()))
    try:
        loss.backward()
    except RuntimeError as error:
        assert "once_differentiable" in str(error)  # noqa: PT017 (the other outcome is allowed as well)
        return
    penalty(plain(x), list(plain.tensors.values())).backward()
    for name, parameter in named.items():
        assert parameter.grad is not None
        want = plain.tensors[name].grad
        assert want is not None
        assert_close(parameter.grad, want, 8 * EPS, name)


@pytest.mark.parametrize("case", each_once(FULL), ids=str)
def test_gradient_checkpointing_changes_nothing(case: Case) -> None:
    seen = []
    for again in (False, True):
        model = case.trained().train()
        x = case.input().requires_grad_()
        torch.default_generator.manual_seed(7)
        output = checkpoint(model, x, use_reentrant=False) if again else model(x)
        output.square().sum().backward()
        assert x.grad is not None
        seen.append({"output": output.detach(), "input": x.grad, **gradients(model)})
    assert_same(*seen)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_autocast(case: Case) -> None:
    """bfloat16 products on a float32 base: within the tolerances of a bfloat16 base."""
    eps = torch.finfo(torch.bfloat16).eps
    model = case.trained()
    plain = Reference(model.adapted, case)
    x = case.input()
    upstream = torch.randn(len(x), case.shape[0]).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
        weight = trimtab.effective_weight(model, "layer") if case.sits_on == "weight" else None
    assert output.dtype == torch.bfloat16
    expected = plain(x)
    assert_close(output, expected, 2 * eps)
    if weight is not None:
        assert weight.dtype == torch.float32
        assert_close(weight, plain.effective().detach(), 2 * EPS, "what is merged keeps its digits")
    output.backward(upstream)
    expected.backward(upstream.double())
    for name, value in gradients(model).items():
        want = plain.tensors[name.removeprefix("layer.adapter.")].grad
        assert want is not None
        assert value.dtype == torch.float32
        assert_close(value, want, 3 * eps, name)


@pytest.mark.parametrize("method", methods.names())
def test_autocast_leaves_float64_alone(method: str) -> None:
    case = next(case for case in cases([torch.float64], SHAPES[:1]) if case.method == method)
    bare, model = case.bare(), case.fresh()
    x = case.input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), bare(x)) or case.magnitude
        assert model(x).dtype == bare(x).dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_torch_compile(training: bool) -> None:
    """Every method, with a magnitude where it can have one, traced by the compiler in one graph: the same outputs and
    gradients."""
    shown = cases([torch.float32], on=["linear", "block"], biased=True, dropout=0.0)
    decomposed = [case for case in shown if case.magnitude or case.sits_on == "block"]
    shape = SHAPES[2]
    models = [
        Case(one.method, one.options, one.base, True, one.dtype, shape).trained().train(training)
        for one in {case.method: case for case in reversed(decomposed)}.values()
    ]
    x = torch.randn(7, shape[1], requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in models])

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    if not training:
        with torch.no_grad():
            want, got = run(x), compiled(x)
        assert_close(got, want, 4 * EPS)
        return
    parameters = [x, *(p for model in models for p in trimtab.trainable_parameters(model).values())]
    want, got = run(x), compiled(x)
    assert_close(got, want, 4 * EPS)
    expected = torch.autograd.grad(want.square().sum(), parameters)
    for value, exact in zip(torch.autograd.grad(got.square().sum(), parameters), expected, strict=True):
        assert_close(value, exact, 8 * EPS)
