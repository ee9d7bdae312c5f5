"""Every method on every base, on a device: right by the plain formula in float64, nothing left behind on the processor,
and no wait in a step."""

from __future__ import annotations

import pytest
import torch

from accelerator import DEVICE, accelerator
from contract_cases import DTYPES, SHAPES, Case, Reference, assert_close, cases
from sampling import sample

CASES = sample(cases(DTYPES, SHAPES[:1]), 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_right_and_stays_on_the_device(case: Case) -> None:
    model = case.trained()
    formula = Reference(model.adapted, case)
    x, gradient_tolerance = case.input(), (3 if case.half else 6) * case.eps
    x64 = x.clone().double().requires_grad_()
    expected = formula(x64)
    with accelerator():
        model, there = model.to(DEVICE), x.to(DEVICE).requires_grad_()
        upstream = torch.randn(expected.shape).to(case.dtype)
        upstream_there = upstream.to(DEVICE)
        model(there)  # what is kept of a frozen weight is computed in the first pass
        with accelerator() as seen:
            output = model(there)
            output.backward(upstream_there)
        assert not seen.waits, "a step waits for the device"
        assert not seen.left, "a step makes tensors on the processor"
        assert not seen.uploads, "a step copies from the processor"
        expected.backward(upstream.double())
        assert_close(output.cpu(), expected, (2 if case.half else 4) * case.eps, "output")
        assert there.grad is not None
        assert x64.grad is not None
        assert_close(there.grad.cpu(), x64.grad, gradient_tolerance, "gradient of the input")
        for name, parameter in model.adapted.adapter.named_parameters():
            wanted = formula.tensors[name].grad
            assert parameter.grad is not None
            assert wanted is not None
            assert_close(parameter.grad.cpu(), wanted, gradient_tolerance, f"gradient of {name}")
