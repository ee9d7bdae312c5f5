"""Adapters by name on a model with every kind of layer, on a device: what is computed and made there is what is made on
the processor, and lies on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import trimtab
from accelerator import DEVICE, NAME, accelerator
from named_adapters import PLANS, Every, attached, ids, rule


def changed_as(change: Callable[[nn.Module], object], model: nn.Module, *, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of ``model`` after ``change``, made on the processor and made on the device."""
    here = copy.deepcopy(model).eval()
    change(here)
    with torch.no_grad():
        wanted = here(batch)
    with accelerator(), torch.no_grad():
        there = copy.deepcopy(model).to(DEVICE).eval()
        change(there)
        assert {one.device.type for one in (*there.parameters(), *there.buffers())} == {NAME}
        return there(batch.to(DEVICE)).cpu(), wanted


@pytest.mark.parametrize("quantised", ["", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("int8", "nf4"))])
def test_adapters_by_name(quantised: str) -> None:
    torch.manual_seed(0)
    model = Every(quantised)
    for name in PLANS:
        attached(model, name)
    model.eval()
    with torch.no_grad():
        wanted = {}
        for name in PLANS:
            trimtab.set_adapter(model, name)
            wanted[name] = model(ids())
    with accelerator(looks=False), torch.no_grad():
        there = model.to(DEVICE)
        assert {one.device.type for one in (*there.parameters(), *there.buffers())} == {NAME}
        batch = ids().to(DEVICE)
        for name, want in wanted.items():
            trimtab.set_adapter(there, name)
            torch.testing.assert_close(there(batch).cpu(), want, rtol=1e-4, atol=1e-4)
        with trimtab.disable_adapter(there):
            there(batch)


def test_each_row_of_a_batch_through_an_adapter_of_its_own() -> None:
    torch.manual_seed(0)
    model = Every("nf4")
    for name, method in (("a", "lora"), ("b", "dora"), ("c", "mora")):
        trimtab.attach(model, [rule(["block.*", "packed"], method, rank=2)], name=name)
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.data.add_(0.03 * torch.randn_like(parameter))
    rows: list[str | None] = ["b", None, "c", "a"]
    model.eval()
    with torch.no_grad(), trimtab.per_row(model, rows):
        wanted = model(ids())
    with accelerator(), torch.no_grad():
        there, batch = model.to(DEVICE), ids().to(DEVICE)
        with trimtab.per_row(there, rows):
            torch.testing.assert_close(there(batch).cpu(), wanted, rtol=1e-4, atol=1e-4)
            with accelerator() as seen:
                there(batch)
    assert not seen.left


@pytest.mark.parametrize(
    "change",
    [trimtab.merge, trimtab.detach, lambda model: trimtab.convert_to_lora(model, rank=4)],
    ids=["merge", "detach", "convert"],
)
@pytest.mark.parametrize("quantised", ["", "int8"])
def test_what_is_made_of_an_adapter(change: Callable[[nn.Module], object], quantised: str) -> None:
    torch.manual_seed(0)
    model = Every(quantised)
    trimtab.attach(model, [rule(["block.*", "packed", "convolution", "embedding", "head"], "dora", rank=2)])
    for parameter in trimtab.trainable_parameters(model).values():
        parameter.data.add_(0.03 * torch.randn_like(parameter))
    got, want = changed_as(change, model, batch=ids())
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_adapters_that_are_combined() -> None:
    torch.manual_seed(0)
    model = Every()
    for name, method in (("a", "lora"), ("b", "dora")):
        trimtab.attach(model, [rule(["block.*", "attention"], method, rank=2)], name=name)
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.data.add_(0.03 * torch.randn_like(parameter))

    def together(one: nn.Module) -> None:
        trimtab.combine(one, {"a": 0.7, "b": 0.3}, name="both")
        trimtab.set_adapter(one, "both")

    got, want = changed_as(together, model, batch=ids())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_training_under_autocast_keeps_to_the_device() -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
    trimtab.attach(model, trimtab.Rule(match="*", method="dora", rank=2))
    x = torch.randn(5, 12)
    with accelerator():
        model.to(DEVICE)
        there = x.to(DEVICE)
        with accelerator() as seen, torch.autocast(NAME, dtype=torch.bfloat16):
            output = model(there)
            output.float().sum().backward()
        assert output.dtype == torch.bfloat16
        assert not seen.waits
        assert not seen.left
        for parameter in trimtab.trainable_parameters(model).values():
            assert parameter.grad is not None
            assert parameter.grad.device.type == NAME
            assert parameter.grad.dtype == parameter.dtype
