"""The best product of low rank, against singular values of the change itself, and of the change on the inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trimtab.ops.truncation import Moments, output_norm, spectrum


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(features: int, count: int = 400) -> Tensor:
    """Inputs of very different sizes, in directions of their own."""
    scales = torch.logspace(0, -3, features, dtype=torch.float64)
    return drawn(count, features, seed=1) * scales @ torch.linalg.qr(drawn(features, features, seed=2))[0]


def moments_of(x: Tensor) -> Moments:
    return Moments(x.T @ x / len(x), len(x))


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_without_inputs_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    delta = drawn(*shape)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    found = spectrum(delta)
    for rank in range(1, min(shape) + 1):
        a, b = found.factors(rank)
        torch.testing.assert_close(b @ a, u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-11, atol=1e-11)
        assert found.bound(rank) == pytest.approx(float(s[rank]) if rank < len(s) else 0.0, abs=1e-12)
        left = torch.linalg.matrix_norm(delta - b @ a)
        assert float(found.errors[rank]) == pytest.approx(float(left / delta.norm()), abs=1e-12)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0)), "of one length"


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_with_inputs_the_outputs_are_as_near_as_any_product_can_bring_them(shape: tuple[int, int]) -> None:
    """The optimum is what Eckart and Young leave of the outputs ``dW X^T``. Where millions of inputs are known, the
    ridge is next to nothing."""
    delta, x = drawn(*shape), inputs(shape[1])
    moments = moments_of(x)._replace(inputs=10**8)
    outputs = delta @ x.T / math.sqrt(len(x))
    best = torch.linalg.svdvals(outputs)
    found = spectrum(delta, moments)
    plain = spectrum(delta)
    for rank in range(1, min(shape)):
        a, b = found.factors(rank)
        off = (delta - b @ a) @ x.T / math.sqrt(len(x))
        least = float(best[rank:].norm())
        assert least * (1 - 1e-9) <= float(off.norm()) <= least * (1 + 1e-4)
        assert float(torch.linalg.matrix_norm(off, 2)) <= found.bound(rank) * (1 + 1e-9)
        assert float(found.errors[rank]) == pytest.approx(float(off.norm() / outputs.norm()), rel=1e-9)
        assert output_norm(delta - b @ a, moments) == pytest.approx(float(off.norm()), rel=1e-9)
        a, b = plain.factors(rank)
        assert float(off.norm()) < float(((delta - b @ a) @ x.T / math.sqrt(len(x))).norm())


@pytest.mark.parametrize("count", [1, 3, 500])
def test_a_change_of_low_rank_is_kept_whatever_the_inputs_are(count: int) -> None:
    delta = drawn(10, 3) @ drawn(3, 14, seed=3)
    x = drawn(count, 4, seed=4) @ drawn(4, 14, seed=5)  # which leave ten directions out
    found = spectrum(delta, moments_of(x))
    assert found.rank == 3
    for rank in (3, 8):
        a, b = found.factors(rank)
        assert (a.shape, b.shape) == ((rank, 14), (10, rank))
        torch.testing.assert_close(b @ a, delta, rtol=1e-11, atol=1e-11)
        assert found.bound(rank) == 0
    assert float(found.errors[3]) == 0


def test_a_diagonal_is_the_matrix_with_zeros_beside_it() -> None:
    delta, counts = drawn(5, 9), torch.tensor([7.0, 0, 3, 1, 0, 0, 40, 2, 1], dtype=torch.float64)
    one, other = spectrum(delta, Moments(counts, 54)), spectrum(delta, Moments(counts.diag(), 54))
    torch.testing.assert_close(one.values, other.values)
    torch.testing.assert_close(one.errors, other.errors)
    (a, b), (c, d) = one.factors(2), other.factors(2)
    torch.testing.assert_close(b @ a, d @ c)
    often = spectrum(delta).factors(2)
    assert float((b @ a - delta)[:, 6].norm()) < float((often[1] @ often[0] - delta)[:, 6].norm())


def test_few_inputs_decide_less_than_many() -> None:
    """Of a direction that four inputs do not show, a product by these four alone would know nothing."""
    delta = drawn(8, 20)
    truth = torch.eye(20, dtype=torch.float64)
    few = drawn(4, 20, seed=6)
    a, b = spectrum(delta, moments_of(few)).factors(4)
    blind, _, _ = torch.linalg.svd(delta @ few.T, full_matrices=False)
    alone = blind @ blind.T @ delta
    best = float(torch.linalg.svdvals(delta)[4:].norm())
    off = output_norm(delta - b @ a, Moments(truth, 1000))
    assert best <= off < output_norm(delta - alone, Moments(truth, 1000))


def test_nothing_stays_nothing() -> None:
    for moments in (None, Moments(torch.zeros(4, 4, dtype=torch.float64), 3)):
        found = spectrum(torch.zeros(3, 4, dtype=torch.float64), moments)
        a, b = found.factors(2)
        assert found.rank == 0
        assert not (b @ a).any()
        assert found.errors.tolist() == [0.0]
    fed_nothing = spectrum(drawn(3, 4), Moments(torch.zeros(4, 4, dtype=torch.float64), 3))
    torch.testing.assert_close(fed_nothing.factors(3)[1] @ fed_nothing.factors(3)[0], drawn(3, 4))


def test_one_output_has_one_direction() -> None:
    delta = drawn(1, 6)
    found = spectrum(delta, Moments(torch.ones(6, dtype=torch.float64), 5))
    assert found.rank == 1
    a, b = found.factors(1)
    torch.testing.assert_close(b @ a, delta)


def test_the_unit_of_the_inputs_decides_nothing() -> None:
    delta, x = drawn(5, 9), inputs(9)
    one, other = spectrum(delta, moments_of(x)), spectrum(delta, moments_of(1e-4 * x))
    torch.testing.assert_close(other.values, 1e-4 * one.values)


@pytest.mark.parametrize(("count", "shrinks"), [(12, 1.0), (40, None), (400, None), (10**8, 1e-6)])
def test_few_inputs_are_shrunk_towards_equal_directions(count: int, shrinks: float | None) -> None:
    """As in OAS (arXiv 0907.4698, equation 23): of the second moments of p features, estimated from n inputs, a share
    rho is replaced by their mean. Added to what is left as it was, that is rho / (1 - rho), within 1e-6 and 1."""
    delta, x = drawn(5, 9), inputs(9, 400) + 0.3 * drawn(400, 9, seed=3)
    moments = moments_of(x)._replace(inputs=count)
    h, p, n = moments.mean, 9, count
    squares, trace = float((h @ h).trace()), float(h.trace())
    rho = ((1 - 2 / p) * squares + trace**2) / ((n + 1 - 2 / p) * (squares - trace**2 / p))
    ridge = shrinks if shrinks is not None else rho / (1 - rho)
    assert (ridge == shrinks) == (rho >= 0.5 or rho < 1e-6)
    root = torch.linalg.cholesky(h + ridge * trace / p * torch.eye(p, dtype=torch.float64))
    best = torch.linalg.svdvals(delta @ root)
    found = spectrum(delta, moments)
    assert [found.bound(rank) for rank in range(5)] == pytest.approx(best.tolist(), rel=1e-9)


def test_equal_directions_are_left_equal() -> None:
    """Where all directions are alike the formula divides by zero; shrinking changes nothing then but the scale."""
    delta = drawn(5, 9)
    found = spectrum(delta, Moments(2.0 * torch.eye(9, dtype=torch.float64), 7))
    best = torch.linalg.svdvals(delta) * math.sqrt(2.0 + 2.0)
    assert [found.bound(rank) for rank in range(5)] == pytest.approx(best.tolist(), rel=1e-9)
