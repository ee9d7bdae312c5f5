"""The loss through a head in chunks, against PyTorch's own cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.models import head_loss as module
from trimtab.models.head_loss import head_loss


def chunks_of(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setattr(module, "CHUNK", positions)
    monkeypatch.setattr(module, "FROZEN_CHUNK", positions)


def reference(head: nn.Linear, hidden: Tensor, targets: Tensor, denominator: float) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of hidden states, weight and bias, all in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    loss = F.cross_entropy(F.linear(*leaves), targets, reduction="sum") / denominator
    return loss, list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("chunk", [1, 5, 16, 1024])
@pytest.mark.parametrize("denominator", [37, torch.tensor(37), torch.tensor(1000.0)])
def test_gradients_equal_autograd(monkeypatch: pytest.MonkeyPatch, chunk: int, denominator: int | Tensor) -> None:
    chunks_of(monkeypatch, chunk)
    head = nn.Linear(8, 30)
    hidden = torch.randn(16, 8, requires_grad=True)
    targets = torch.randint(0, 30, (16,))
    loss = head_loss(head, hidden, targets, denominator)
    (3.0 * loss).backward()
    expected, gradients = reference(head, hidden, targets, float(denominator))
    # float32 against float64: sums of 16 x 30 terms near 1, each rounded at 6e-8.
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    for parameter, gradient in zip((hidden, head.weight, head.bias), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, 3.0 * gradient.float(), rtol=1e-4, atol=1e-6)


def test_passes_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 3)
    head = nn.Linear(4, 6).double()
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 6, (7,))
    assert torch.autograd.gradcheck(
        lambda states, *_: head_loss(head, states, targets, 5), (hidden, *head.parameters())
    )


def test_a_frozen_head_gets_no_gradient_and_keeps_none() -> None:
    head = nn.Linear(8, 30).requires_grad_(False)
    hidden, targets = torch.randn(300, 8, requires_grad=True), torch.randint(0, 30, (300,))
    head_loss(head, hidden, targets, 300).backward()
    _, gradients = reference(head, hidden, targets, 300)
    torch.testing.assert_close(hidden.grad, gradients[0].float(), rtol=1e-4, atol=1e-7)
    assert head.weight.grad is None


def test_hidden_states_without_gradient_still_train_the_head() -> None:
    head = nn.Linear(8, 30)
    hidden, targets = torch.randn(4, 8), torch.tensor([1, 2, 3, 4])
    head_loss(head, hidden, targets, 4).backward()
    _, gradients = reference(head, hidden, targets, 4)
    torch.testing.assert_close(head.weight.grad, gradients[1].float(), rtol=1e-4, atol=1e-6)


def test_no_positions_is_zero_and_differentiable() -> None:
    head = nn.Linear(8, 30)
    hidden = torch.zeros(0, 8, requires_grad=True)
    loss = head_loss(head, hidden, torch.zeros(0, dtype=torch.int64), 1)
    loss.backward()
    assert loss == 0
    assert torch.equal(head.weight.grad, torch.zeros(30, 8))


def test_without_gradients_the_value_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 3)
    head, hidden, targets = nn.Linear(8, 30), torch.randn(10, 8), torch.randint(0, 30, (10,))
    with torch.no_grad():
        quiet = head_loss(head, hidden, targets, 10)
    assert not quiet.requires_grad
    assert quiet == head_loss(head, hidden.requires_grad_(), targets, 10).detach()


def test_float16_gradients_do_not_vanish() -> None:
    """Divided by a million labels in float16, a gradient would be 0; a loss scale applied afterwards must find it."""
    head = nn.Linear(8, 30).half().requires_grad_(False)
    hidden = torch.randn(6, 8).half().requires_grad_()
    targets = torch.randint(0, 30, (6,))
    (head_loss(head, hidden, targets, 1_000_000) * 2.0**20).backward()
    _, gradients = reference(head, hidden, targets, 1_000_000)
    # float16 keeps 11 bits; the gradients are sums of 30 terms.
    torch.testing.assert_close(hidden.grad.double(), gradients[0] * 2.0**20, rtol=2e-2, atol=2e-3)


def test_bfloat16_gradients_are_as_near_as_autograd_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 64)
    head = nn.Linear(32, 200).bfloat16()
    hidden, targets = torch.randn(256, 32).bfloat16(), torch.randint(0, 200, (256,))
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (head_loss(head, ours, targets, 300) / 3).backward()
    weight = head.weight.grad.clone()
    head.zero_grad()
    (F.cross_entropy(head(plain).float(), targets, reduction="sum") / 300 / 3).backward()
    _, exact = reference(head, hidden, targets, 900)

    def error(found: Tensor, true: Tensor) -> float:
        return float((found.double() - true).norm() / true.norm())

    # Both are one rounding to bfloat16 away from what their logits give; a quarter more leaves room for chance.
    assert error(ours.grad, exact[0]) < 1.25 * error(plain.grad, exact[0])
    assert error(weight, exact[1]) < 1.25 * error(head.weight.grad, exact[1])


def test_logits_of_all_positions_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 4)
    head = nn.Linear(8, 30)
    rows: list[int] = []
    head.register_forward_hook(lambda _, inputs, output: rows.append(output.shape[0]))
    head_loss(head, torch.randn(11, 8, requires_grad=True), torch.randint(0, 30, (11,)), 11).backward()
    assert rows == [4, 4, 3]
