"""Every set of kernels, against the formulas: what each pass gives, and what it leaves where it was."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.ops.kernels import channels, kernels_for, plain
from trimtab.ops.kernels.contract import BackwardPass, KernelSet, Thin
from trimtab.ops.ratio import Ratio, ratio_of

TOKENS, OUT, RANK = 20, 12, 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Turned:
    """The passes over channels that come before the places, on views ``[2, features, TOKENS / 2]`` of tensors
    ``[TOKENS, features]``."""

    @staticmethod
    def view(tensor: Tensor) -> Tensor:
        return tensor.view(2, -1, tensor.shape[1]).transpose(1, 2)

    @staticmethod
    def back(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(0, 1)

    def _thin(self, thin: Thin | None) -> Thin | None:
        return None if thin is None else thin._replace(inner=self.view(thin.inner))

    def forward(
        self, product: Tensor, *, thin: Thin | None, ratio: Ratio | None, bias: Tensor | None, in_place: bool
    ) -> Tensor:
        thin, product = self._thin(thin), self.view(product)
        return self.back(channels.forward(product, thin=thin, ratio=ratio, bias=bias, in_place=in_place))

    def backward(self, grad: Tensor, *, thin: Thin | None, witness: Tensor | None, **asked: Any) -> BackwardPass:
        witness = None if witness is None else self.view(witness)
        got = channels.backward(self.view(grad), thin=self._thin(thin), witness=witness, **asked)
        inner = None if got.inner is None else self.back(got.inner)
        return got._replace(grad=self.back(got.grad), inner=inner)


SETS: dict[str, KernelSet] = {"plain": plain, "channels": Turned()}
if find_spec("triton") is not None:  # on a processor in its interpreter (tests/conftest.py)
    from trimtab.ops.kernels import triton

    SETS["triton"] = triton


class Parts:
    """A product and what is done to it, random, in a dtype; and the same in float64."""

    def __init__(self, dtype: torch.dtype, thin: bool, ratio: bool | str, bias: bool) -> None:
        self.full = torch.float64 if dtype == torch.float64 else torch.float32
        self.product, self.inner = torch.randn(TOKENS, OUT).to(dtype), torch.randn(TOKENS, RANK).to(dtype)
        self.b = torch.randn(OUT, RANK).to(self.full)
        self.bias = torch.randn(OUT).to(dtype) if bias else None
        near = torch.linspace(0.8, 1.3, OUT) if ratio == "near" else torch.linspace(0.0, 3.0, OUT)
        self.ratio: Ratio | None = (
            ratio_of(near.to(self.full), torch.ones(OUT, dtype=self.full), dtype) if ratio else None
        )
        self.thin = Thin(self.inner, self.b, 0.7) if thin else None
        self.c = torch.ones(OUT).double() if self.ratio is None else self.ratio.values.double()

    def summed(self) -> Tensor:
        """``p + s h B^T`` in float64."""
        thin = 0.7 * self.inner.double() @ self.b.double().t() if self.thin is not None else 0
        return self.product.double() + thin


def assert_within(got: Tensor, want: Tensor, units: float, dtype: torch.dtype, terms: Tensor | float = 0.0) -> None:
    """``units`` roundings of ``dtype`` of the sum of what was added up."""
    bound = units * torch.finfo(dtype).eps * (want.abs() + terms) + 1e-300
    assert bool(((got.double() - want).abs() <= bound).all()), float(((got.double() - want).abs() / bound).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", SETS)
def test_forward(kernels: str, dtype: torch.dtype) -> None:
    for thin, ratio, bias, in_place in itertools.product([0, 1], [False, "near", "far"], [0, 1], [0, 1]):
        parts = Parts(dtype, bool(thin), ratio, bool(bias))
        summed = parts.summed()
        want = summed * parts.c + (0 if parts.bias is None else parts.bias.double())
        size = parts.product.double().abs() + 0.7 * parts.inner.double().abs() @ parts.b.double().abs().t()
        product = parts.product.clone()
        got = SETS[kernels].forward(
            product, thin=parts.thin, ratio=parts.ratio, bias=parts.bias, in_place=bool(in_place)
        )
        assert got.dtype == dtype
        # B, the sum, the ratio and the bias are each rounded once.
        assert_within(got, want, 4, dtype, size * parts.c.clamp_min(1))
        if parts.ratio is not None and not in_place:
            assert_within(product, summed, 4, dtype, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", SETS)
def test_a_wider_inner_product_is_rounded_once(kernels: str, dtype: torch.dtype) -> None:
    parts = Parts(dtype, True, False, False)
    want, product = parts.summed(), parts.product.clone()
    thin = Thin(parts.inner.float(), parts.b, 0.7)
    got = SETS[kernels].forward(product, thin=thin, ratio=None, bias=None, in_place=True)
    units = 1.01 if (kernels, dtype) == ("triton", torch.bfloat16) else 0.51  # Triton's interpreter cuts digits off
    assert bool(((got.double() - want).abs() <= units * torch.finfo(dtype).eps * want.abs() + 1e-5).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", SETS)
def test_backward(kernels: str, dtype: torch.dtype) -> None:
    for thin, ratio, witnessed, bias, scaled in itertools.product(
        [0, 1], [False, "near", "far"], [0, 1], [0, 1], [0, 1]
    ):
        parts = Parts(dtype, bool(thin), ratio, False)
        grad, y = torch.randn(TOKENS, OUT).to(dtype), torch.randn(TOKENS, OUT).to(dtype)
        before = grad.clone()
        got = SETS[kernels].backward(
            grad,
            thin=parts.thin,
            ratio=parts.ratio,
            witness=y if witnessed else None,
            wants_bias=bool(bias),
            wants_scaled=bool(scaled),
        )
        assert torch.equal(grad, before), "the upstream gradient belongs to autograd"
        exact, c = grad.double(), parts.c
        assert_within(got.grad, exact * c if scaled else exact, 2, dtype)
        assert (got.bias is None, got.witnessed is None) == (not bias, not witnessed)
        if got.bias is not None:
            assert_within(got.bias, exact.sum(0), 2, dtype, exact.abs().sum(0))
        if got.witnessed is not None:
            assert_within(got.witnessed, (exact * y.double()).sum(0), 2, dtype, (exact * y.double()).abs().sum(0))
        assert (got.inner is None, got.b is None) == (not thin, not thin)
        if got.inner is not None and got.b is not None:
            b, inner = parts.b.double(), parts.inner.double()
            assert (got.inner.dtype, got.b.dtype) == (dtype, parts.b.dtype)
            size = 0.7 * (exact * c).abs() @ b.abs()
            assert_within(got.inner, 0.7 * (exact * c) @ b, 4, dtype, size)
            size = 0.7 * (exact * c).abs().t() @ inner.abs()
            assert_within(got.b, 0.7 * (exact * c).t() @ inner, 4, dtype, size)


def test_a_processor_has_kernels() -> None:
    assert kernels_for(torch.zeros(2, 3)) is plain
    assert kernels_for(torch.zeros(2, 3, 4)) is channels


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_beyond_the_caches_is_summed_in_blocks_to_the_same(dtype: torch.dtype) -> None:
    tokens, out = 5000 // dtype.itemsize + 1, 4 * 499
    grad, witness = torch.randn(tokens, out).to(dtype), torch.randn(out, tokens).to(dtype).t()
    got = plain.backward(grad, thin=None, ratio=None, witness=witness, wants_bias=False, wants_scaled=False).witnessed
    terms = grad.double() * witness.double()
    assert got is not None
    assert_within(got, terms.sum(0), 4, dtype, terms.abs().sum(0) / 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["plain", "triton"])
def test_norms_and_folded_weights(kernels: str, dtype: torch.dtype) -> None:
    if kernels not in SETS:
        pytest.skip("triton is not installed")
    full = torch.promote_types(dtype, torch.float32)
    for rank, turned in itertools.product([1, 5, 40], [False, True]):
        weight = torch.randn(40, 70).to(dtype).t() if turned else torch.randn(70, 40).to(dtype)
        a, b = torch.randn(rank, 40).to(full), torch.randn(70, rank).to(full)
        total = weight.double() + 0.3 * b.double() @ a.double()
        squares = weight.double().square().sum(1).to(full)
        got = SETS[kernels].squared_norms(weight, squares, a, b, scale=0.3)
        assert got.dtype == full
        crossed = 0.6 * ((weight.double().abs() @ a.double().abs().t()) * b.double().abs()).sum(1)
        assert_within(got, total.square().sum(1), 4, full, total.square().sum(1)) if dtype == full else assert_within(
            got, total.square().sum(1), 2, dtype, crossed
        )
        for ratio in (None, torch.linspace(0.1, 3, 70).to(full)):
            want = total if ratio is None else total * ratio.double()[:, None]
            folded = SETS[kernels].fold(weight, ratio, a, b, scale=0.3)
            assert folded.stride() == weight.stride()
            size = (0.3 * b.double().abs() @ a.double().abs()) * (1 if ratio is None else ratio.double()[:, None])
            assert_within(folded, want, 2, dtype, size if dtype == full else 1e-5)
