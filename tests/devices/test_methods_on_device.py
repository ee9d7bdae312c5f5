"""Every method on every base, on a device: right by the plain formula in float64, nothing left behind on the processor,
and no wait in a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trimtab
from accelerator import DEVICE, NAME, accelerator
from contract_cases import DTYPES, SHAPES, Case, Reference, assert_close, cases, each_once, stir
from sampling import sample

CASES = sample(each_once(cases(DTYPES, SHAPES[:1])), 3)


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


@pytest.mark.parametrize("method", ["dora", "mora"])
def test_an_evaluation_waits_for_nothing_and_sees_what_changed(method: str) -> None:
    layer = torch.nn.Linear(12, 10)
    model = torch.nn.Sequential(layer)
    trimtab.attach(model, trimtab.Rule(match="*", method=method, rank=2, magnitude=True))
    x = torch.randn(3, 12)
    with accelerator(), torch.no_grad():
        model.to(DEVICE).eval()
        there = x.to(DEVICE)
        before = model(there)
        with accelerator() as seen:
            assert model(there).shape == (3, 10)
        assert not seen.waits
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.data.mul_(1.5).add_(0.1)  # which leaves no version behind
        after = model(there).cpu()
        with trimtab.for_inference(model):
            assert torch.allclose(model(there).cpu(), after, atol=1e-6)
            with accelerator() as seen:
                model(there)
        assert not seen.waits
        assert not torch.allclose(before.cpu(), after)
        weight = trimtab.effective_weight(model, "0").cpu().double()
        assert layer.bias is not None
        torch.testing.assert_close(
            after.double(), x.double() @ weight.t() + layer.bias.cpu().double(), rtol=1e-5, atol=1e-5
        )


def test_norms_follow_the_model_from_device_to_device(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 6))
    trimtab.attach(model, trimtab.Rule(match="*", method="dora", rank=2))
    stir(model)
    x = torch.randn(3, 12)
    here = model(x)
    with accelerator():
        model.to(DEVICE)
        assert torch.allclose(model(x.to(DEVICE)).cpu(), here, atol=1e-5)
        with torch.no_grad():
            model[0].base.weight.mul_(2)  # type: ignore[operator, union-attr]
        there = model(x.to(DEVICE)).cpu()
        assert not torch.allclose(there, here, atol=1e-3)
        trimtab.save_adapter(model, tmp_path)
        other = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 6)).to(DEVICE)
        trimtab.load_adapter(other, tmp_path)
        assert {parameter.device.type for parameter in other.parameters()} == {NAME}
        model.cpu()
        assert torch.allclose(model(x), there, atol=1e-5)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
