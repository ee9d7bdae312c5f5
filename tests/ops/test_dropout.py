"""Dropout: the share that is dropped, the mean that stays, its gradient, its seed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trimtab.ops import dropout as dropout_module
from trimtab.ops.dropout import draw_keep, dropout


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


@pytest.fixture
def drawn_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerators and compiled graphs do, done here."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.usefixtures("drawn_in_parallel")
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_a_draw_in_parallel_keeps_the_same_share(probability: float) -> None:
    x = torch.ones(1000, 999, dtype=torch.bfloat16, requires_grad=True)
    keep = draw_keep(x, probability)
    assert keep is not None
    assert keep.mask.dtype == torch.int8
    assert not keep.mask.requires_grad
    assert set(keep.mask.unique().tolist()) == {-1, 0}
    assert float((keep.mask == 0).double().mean()) == pytest.approx(probability, abs=0.0025)
    assert keep.scale == pytest.approx(1 / (1 - probability))


@pytest.mark.parametrize(("probability", "bits"), [(0.25, 8), (7 / 256, 8), (0.3, 16), (0.25 + 1 / 257, 16)])
def test_no_more_is_drawn_than_the_elements_take(
    probability: float, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def words(count: int) -> torch.Tensor:
        asked.append(count)
        return torch.zeros(count, dtype=torch.int64)

    monkeypatch.setattr(dropout_module, "_random_words", words)
    draw_keep(torch.ones(1000), probability)
    assert asked == [1000 * bits // 64 + 1]


def test_the_least_that_is_kept_is_one_of_65536() -> None:
    keep = draw_keep(torch.ones(8), 1 - 1e-9)
    assert keep is not None
    assert keep.scale == 65536


def test_a_step_that_is_traced_draws_without_a_value() -> None:
    with FakeTensorMode():
        x = torch.ones(5, 7)
        keep = draw_keep(x, 0.3)
    assert keep is not None
    assert keep.mask.shape == x.shape
    assert type(keep.mask) is not torch.Tensor


def test_words_come_from_the_whole_range_of_their_type() -> None:
    words = dropout_module._random_words(100_000).double() / 2**63
    # Of a uniform draw from -1 to 1: the mean has a standard deviation of 0.0018, that of the square 0.0009.
    assert float(words.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(words.square().mean()) == pytest.approx(1 / 3, abs=0.005)
