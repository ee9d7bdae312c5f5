"""Rows through a stack of weights, each through that of its expert: in turn, as an accelerator does it, and chosen by
row, held against a loop over the rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.ops.expert_rows import ChosenRows, SortedRows, StackMap
from trimtab.ops.kernels.contract import Thin
from trimtab.ops.ratio import Ratio, ratio_of

COUNTS = [3, 0, 1, 4, 0]  # rows of each expert; the first of all and the last have none in some places
OUT, IN, RANK, SCALE = 6, 10, 2, 1.5
WAYS = ("in turn", "grouped", "chosen")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Of the largest value: a sum of ten products in the dtype, whose last bit is 1e-16, 6e-8 and 4e-3."""


def experts() -> Tensor:
    return torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))


def made(way: str, weight: Tensor, asked: list[Tensor] | None = None) -> StackMap:
    def frozen(rows: Tensor) -> Tensor:
        if asked is not None:
            asked.append(rows)
        return each(rows, weight.mT)

    if way == "chosen":
        return ChosenRows(weight, frozen, experts())
    ends = torch.tensor(COUNTS).cumsum(0).int()
    map_ = SortedRows(weight, frozen, ends)
    map_._in_turn = way == "in turn"
    return map_


def each(rows: Tensor, stack: Tensor) -> Tensor:
    """The reference: one row after the other, ``rows [rows, k]`` by ``stack [experts, k, n]``."""
    return torch.stack([row @ stack[expert] for row, expert in zip(rows, experts(), strict=True)])


def outer(left: Tensor, right: Tensor) -> Tensor:
    product = left.new_zeros(len(COUNTS), left.shape[1], right.shape[1])
    for row, expert in enumerate(experts()):
        product[expert] += torch.outer(left[row], right[row])
    return product


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE[dtype], float(error)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [IN, 72])  # a thin stack and one whose sides are both above 64
@pytest.mark.parametrize("way", WAYS)
def test_each_row_meets_the_matrix_of_its_expert(way: str, width: int, dtype: torch.dtype) -> None:
    height = OUT if width == IN else 80
    weight, rows = draw(len(COUNTS), height, width, dtype=dtype), draw(sum(COUNTS), width, dtype=dtype)
    grad = draw(sum(COUNTS), height, dtype=dtype)
    asked: list[Tensor] = []
    through = made(way, weight, asked)
    wide = weight.double()

    other = draw(len(COUNTS), height, width, dtype=dtype)
    close(through.product(rows, other), each(rows.double(), other.double().mT), dtype)
    assert not asked  # what is no frozen weight is not multiplied by the model's own function
    through.product(rows, weight)
    assert asked[0] is rows

    product = through.times(rows, weight.mT)
    assert (product.dtype, product.shape) == (dtype, (sum(COUNTS), height))
    close(product, each(rows.double(), wide.mT), dtype)
    close(through.input_gradient(grad, weight, rows.shape), each(grad.double(), wide), dtype)
    target = rows.clone()
    through.add_input_gradient(target, grad, weight)
    close(target, rows.double() + each(grad.double(), wide), dtype)
    found = through.weight_gradient(grad, rows, weight.shape)
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    close(found, outer(grad.double(), rows.double()), dtype)
    assert not found[COUNTS.index(0)].any()
    assert through.tokens(rows) == sum(COUNTS)


@pytest.mark.parametrize("near_one", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_an_update_and_a_ratio_of_each_expert_are_added(way: str, dtype: torch.dtype, near_one: bool) -> None:
    weight, product = draw(len(COUNTS), OUT, IN, dtype=dtype), draw(sum(COUNTS), OUT, dtype=dtype)
    inner, b = draw(sum(COUNTS), RANK, dtype=dtype), draw(len(COUNTS), OUT, RANK).float()
    norm = torch.rand(len(COUNTS), OUT) + 1
    ratio = ratio_of(norm * (1.2 if near_one else 3) - 0.01 * torch.rand(norm.shape), norm, dtype)
    assert ratio.near_one is near_one
    through = made(way, weight)
    c = ratio.values.double()[experts()]
    summed = product.double() + SCALE * each(inner.double(), b.double().mT)

    for thin, wanted in ((Thin(inner, b, SCALE), summed), (None, product.double())):
        for factors, expected in ((ratio, wanted * c), (None, wanted)):
            for in_place in (True, False):
                given = product.clone()
                output = through.forward(given, thin=thin, ratio=factors, bias=None, in_place=in_place)
                close(output, expected, dtype)
                close(given, expected if in_place else wanted, dtype)


@pytest.mark.parametrize("wants_scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_the_way_back_gives_what_is_asked_for(way: str, dtype: torch.dtype, wants_scaled: bool) -> None:
    weight, grad, witness = draw(len(COUNTS), OUT, IN, dtype=dtype), *draw(2, sum(COUNTS), OUT, dtype=dtype)
    inner, b = draw(sum(COUNTS), RANK, dtype=dtype), draw(len(COUNTS), OUT, RANK).float()
    norm = torch.rand(len(COUNTS), OUT) + 1
    ratio = ratio_of(norm * 1.2 - 0.01 * torch.rand(norm.shape), norm, dtype)
    through = made(way, weight)
    scaled = grad.double() * ratio.values.double()[experts()]
    sums = outer(grad.double() * witness.double(), torch.ones(sum(COUNTS), 1, dtype=torch.float64)).squeeze(2)

    for thin in (Thin(inner, b, SCALE), None):
        for factors, wanted in ((ratio, scaled), (None, grad.double())):
            for seen in (witness, None):
                passed = through.backward(
                    grad.clone(), thin=thin, ratio=factors, witness=seen, wants_bias=False, wants_scaled=wants_scaled
                )
                assert passed.bias is None
                close(passed.grad, wanted if wants_scaled else grad.double(), dtype)
                assert (passed.witnessed is None) == (seen is None)
                if passed.witnessed is not None:
                    close(passed.witnessed, sums, dtype)
                assert (passed.inner is None) == (passed.b is None) == (thin is None)
                if passed.inner is not None and passed.b is not None:
                    close(passed.inner, SCALE * each(wanted, b.double()), dtype)
                    close(passed.b, SCALE * outer(wanted, inner.double()), dtype)
                    assert passed.b.dtype == b.dtype


@pytest.mark.parametrize("way", ["in turn", "chosen"])
def test_rows_that_are_cut_into_parts_keep_their_expert(way: str) -> None:
    weight = draw(len(COUNTS), OUT, IN)
    through = made(way, weight).repeated(3)
    assert through.experts(3 * sum(COUNTS)).tolist() == experts().repeat_interleave(3).tolist()
    rows, other = draw(3 * sum(COUNTS), IN), draw(len(COUNTS), OUT, IN)
    wanted = torch.stack([each(part, other.mT) for part in rows.view(-1, 3, IN).unbind(1)], 1).flatten(0, 1)
    close(through.product(rows, other), wanted, torch.float64)


def test_rows_behind_the_last_end_are_nobodys() -> None:
    """A model pads its rows to a fixed number when it is compiled: they stay zero, and no expert reads them."""
    through = made("in turn", draw(len(COUNTS), OUT, IN))
    padded = sum(COUNTS) + 2
    rows, stack = draw(padded, IN), draw(len(COUNTS), IN, OUT)
    assert not through.times(rows, stack)[-2:].any()
    assert through.experts(padded).max() < len(COUNTS)
    found = through.outer(draw(padded, OUT), rows)
    assert torch.isfinite(found).all()


def test_the_excess_of_a_ratio_is_used_in_its_own_dtype_alone() -> None:
    """``c - 1`` in bfloat16 is for tensors in bfloat16: a float32 gradient of the same layer takes ``c`` itself."""
    norm = torch.rand(len(COUNTS), OUT) + 1
    ratio = ratio_of(norm * 1.2, norm, torch.bfloat16)
    through = made("grouped", draw(len(COUNTS), OUT, IN, dtype=torch.float32))
    half, full = (
        through._of_rows(ratio, draw(sum(COUNTS), OUT, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)
    )
    assert half.excess is not None
    assert half.excess.shape == (sum(COUNTS), OUT)
    assert full.excess is None
    assert isinstance(half, Ratio)
    assert torch.equal(full.values, ratio.values[experts()])
