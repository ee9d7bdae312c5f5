"""The quick way for a few tokens: which batches it takes, and that it gives what the layer gives."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops.few_tokens import TOKENS, FewTokensLinear
from trimtab.ops.frozen_linear import Operands
from trimtab.ops.linear_map import MATRIX
from trimtab.ops.low_rank import LowRank
from trimtab.ops.ratio import ratio_of


@pytest.fixture
def operands() -> Operands:
    weight, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    ratio = ratio_of(1 + torch.rand(5, dtype=torch.float64) / 4, torch.ones(5, dtype=torch.float64), torch.float64)
    tensors = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    return Operands(weight=weight, bias=bias, ratio=ratio, update=LowRank(0.5), tensors=tensors, through=MATRIX)


def test_it_takes_a_few_tokens_of_the_weights_dtype(operands: Operands) -> None:
    layer = FewTokensLinear(operands, {"weight": operands.weight, "bias": operands.bias})
    assert layer.takes(torch.empty(TOKENS, 3, dtype=torch.float64))
    assert layer.takes(torch.empty(1, 1, 3, dtype=torch.float64))
    assert not layer.takes(torch.empty(TOKENS + 1, 3, dtype=torch.float64))
    assert not layer.takes(torch.empty(1, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not layer.takes(torch.empty(1, 3, dtype=torch.float64))


def test_it_gives_the_formula(operands: Operands) -> None:
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    a, b = operands.tensors
    assert operands.ratio is not None
    assert operands.bias is not None
    total = (operands.weight + 0.5 * b @ a) * operands.ratio.values[:, None]
    expected = x @ total.T + operands.bias
    torch.testing.assert_close(
        FewTokensLinear(operands, {"weight": operands.weight, "bias": operands.bias})(x),
        expected,
        rtol=1e-12,
        atol=1e-12,
    )
