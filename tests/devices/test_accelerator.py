"""The fake accelerator tells what a real one would: numbers, devices, waits, and what is left on the processor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accelerator import DEVICE, NAME, accelerator, keeping
from trimtab import machine
from trimtab.ops.decomposition import decompose


def test_it_is_there_only_while_it_is_open() -> None:
    assert machine.device().type == "cpu"
    with accelerator():
        assert machine.device().type == NAME
    assert machine.device().type == "cpu"


def test_it_computes_what_the_processor_computes() -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    x = torch.randn(5, 6)
    here(x).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in here.parameters() if parameter.grad is not None]
    here.zero_grad()
    with accelerator() as seen:
        there = here.to(DEVICE)
        there(x.to(DEVICE)).square().sum().backward()
        optimiser = torch.optim.AdamW(there.parameters(), fused=True)
        optimiser.step()
        for parameter, grad in zip(there.parameters(), wanted, strict=True):
            assert parameter.device == DEVICE
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.cpu(), grad, rtol=1e-5, atol=1e-5)
    assert seen.launches["_fused_adamw_"] == 1


def test_views_share_their_memory() -> None:
    with accelerator():
        matrix = torch.zeros(4, 3, device=DEVICE)
        matrix[1:, 0].add_(2)
        matrix.t()[2].fill_(5)
        assert matrix.cpu().tolist() == [[0, 0, 5], [2, 0, 5], [2, 0, 5], [2, 0, 5]]
        assert matrix[1:].untyped_storage().data_ptr() == matrix.data_ptr()


def test_tensors_of_two_devices_do_not_mix() -> None:
    with accelerator(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_what_waits_is_told_by_its_line() -> None:
    with accelerator() as seen:
        numbers = torch.arange(4.0, device=DEVICE)
        assert seen.waits.total() == 0
        float(numbers.sum())
        assert bool(numbers.any())
        numbers[numbers > 1]
        numbers.cpu()
    assert {place.split()[0] for place in seen.waits} == {"item", "nonzero", "index", "copy"}


def test_what_a_line_of_ours_makes_on_the_processor_is_told() -> None:
    with accelerator() as seen:
        decompose(torch.ones(3, 4))
    assert any("ops/decomposition.py" in place for place in seen.left)
    with accelerator() as seen:
        decompose(torch.ones(3, 4, device=DEVICE))
    assert seen.left.total() == 0
    assert sum(count for line, count in seen.lines.items() if "ops/decomposition.py" in line) == seen.count - 1


def test_kept_bytes_are_those_for_the_backward_pass() -> None:
    layer, x = nn.Linear(6, 8).requires_grad_(False), torch.randn(5, 6)
    with accelerator() as seen:
        layer, x = layer.to(DEVICE), x.to(DEVICE).requires_grad_()
        with keeping(seen, x, *layer.parameters()):
            layer(x).exp()
    assert seen.kept == 5 * 8 * 4


def test_autocast_lowers_products() -> None:
    with accelerator(), torch.autocast(NAME, dtype=torch.bfloat16):
        layer = nn.Linear(4, 4).to(DEVICE)
        x = torch.randn(2, 4, device=DEVICE)
        assert layer(x).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32
