"""Dropout: the share that is dropped, the mean that stays, its gradient, its seed."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.05, 0.25, 0.5, 0.9])
def test_drops_its_share_and_keeps_the_mean(probability: float, dtype: torch.dtype) -> None:
    x = torch.ones(1000, 999, dtype=dtype)
    y = dropout(x, probability)
    # A million draws: the share's standard deviation is below 0.0005, and so is that of the mean times the scale.
    assert float((y == 0).double().mean()) == pytest.approx(probability, abs=0.0025)
    assert float(y[y != 0].double().mean()) == pytest.approx(1 / (1 - probability), rel=4e-3)  # half a bfloat16 step
    # Neighbours come from one draw of 64 bits and must not move together.
    dropped = (y == 0).double() - probability
    together = float((dropped[:, 1:] * dropped[:, :-1]).mean()) / (probability * (1 - probability))
    assert together == pytest.approx(0.0, abs=0.005)


def test_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(64, 33, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)
    torch.testing.assert_close(x.grad[y != 0], torch.full_like(x.grad[y != 0], 1 / 0.75), rtol=1e-5, atol=0)


def test_the_seed_decides() -> None:
    x = torch.randn(17, 5)
    torch.manual_seed(3)
    first, other = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 5, 7)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert dropout(torch.ones(shape), 0.3).shape == shape


def test_next_to_nothing_drops_nothing() -> None:
    x = torch.randn(8, 8)
    assert dropout(x, 1e-9) is x


def test_next_to_everything_drops_it() -> None:
    assert not dropout(torch.randn(8, 8), 1 - 1e-9).any()


@pytest.mark.parametrize("probability", [0.25, 0.3])  # of 8 and of 16 bits
@pytest.mark.parametrize("lag", [2, 3, 4, 7, 8])
def test_elements_further_apart_are_independent_too(lag: int, probability: float) -> None:
    dropped = (dropout(torch.ones(1 << 18), probability) == 0).double() - probability
    together = float((dropped[lag:] * dropped[:-lag]).mean()) / (probability * (1 - probability))
    assert together == pytest.approx(0.0, abs=5 / 2**9)  # five standard deviations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """1 / 0.75 is no number of half precision; what is kept is multiplied by it all the same."""
    x = torch.randn(1000).to(dtype)
    y = dropout(x, 0.25)
    assert torch.equal(y[y != 0], (x.double() / 0.75).to(dtype)[y != 0])
