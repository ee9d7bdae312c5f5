"""Which form is chosen, and that both give the plain formula's numbers."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops import cost
from trimtab.ops.cost import Work, folds_gradient, folds_output
from trimtab.ops.kernels import plain
from trimtab.ops.low_rank import LowRank
from trimtab.ops.square import Square

FULL, HALF = torch.float32, torch.bfloat16
SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
LIKE_FULL, LIKE_HALF = torch.empty(0), torch.empty(0, dtype=HALF)


def low_rank(tokens: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> Work:
    tensors = torch.empty(rank, in_features), torch.empty(out_features, rank)
    return LowRank(1.0).work(tokens, tensors, dtype)


@pytest.mark.parametrize("scaled", [False, True])
def test_many_tokens_fold_and_few_do_not(scaled: bool) -> None:
    shape = (512, 768)
    for tokens, folds in ((1, False), (128, False), (8192, True)):
        work = low_rank(tokens, *shape, 16, FULL)
        assert folds_output("auto", work, tokens, shape, scaled=scaled, like=LIKE_FULL) is folds
        assert folds_gradient("auto", work, tokens, shape, scaled=scaled, like=LIKE_FULL) is folds


def test_a_rounded_weight_is_never_chosen_for_the_output() -> None:
    work = low_rank(1 << 20, 64, 64, 4, HALF)
    assert not folds_output("auto", work, 1 << 20, (64, 64), scaled=True, like=LIKE_HALF)
    assert folds_output("folded", work, 1 << 20, (64, 64), scaled=True, like=LIKE_HALF)
    assert folds_gradient("auto", work, 1 << 20, (64, 64), scaled=True, like=LIKE_FULL)


def test_the_choice_turns_where_the_passes_are_even() -> None:
    """Of a weight of 10 x 20, formed in 900 passes and scaled in 0.6 of one each: 1,020. An output of 30 tokens is
    scaled in 300; a gradient in 1.5 passes over 10 x 20, or 10 x 15 where there are 15 tokens. A draw is for the
    factored one."""
    for more, folds in ((0.0, False), (0.5, True)):
        work = Work(product=720 + more, gradient=720 + more, fold=900)
        assert folds_output("auto", work, 30, (10, 20), scaled=True, like=LIKE_FULL) is folds
        assert folds_gradient("auto", work, 30, (10, 20), scaled=True, like=LIKE_FULL) is folds
        work = Work(product=900 + more, gradient=795 + more, fold=900)
        assert folds_gradient("auto", work, 15, (10, 20), scaled=True, like=LIKE_FULL) is folds
        assert folds_output("auto", work, 30, (10, 20), scaled=False, like=LIKE_FULL) is folds
        assert not folds_gradient("auto", work, 15, (10, 20), scaled=False, like=LIKE_FULL)


def test_passes_of_a_low_rank_update() -> None:
    """Rank 4 on 5 x 7 and 3 tokens: one pass and 4 / 20 of one for the product, in bfloat16 4 / 120, in float64 4 / 10;
    a weight in bfloat16 is formed in 1.7 passes and 4 / 20."""
    assert low_rank(3, 5, 7, 4, FULL) == pytest.approx((1.2 * 15, 1.2 * 21, 1.2 * 35))
    assert low_rank(3, 5, 7, 4, HALF) == pytest.approx((15 + 15 / 30, 21 + 21 / 30, 1.9 * 35))
    assert low_rank(3, 5, 7, 4, torch.float64) == pytest.approx((1.4 * 15, 1.4 * 21, 1.4 * 35))


@pytest.mark.parametrize("compute", ["folded", "factored"])
def test_the_user_overrules(compute: cost.Compute) -> None:
    for tokens in (1, 1 << 20):
        work = low_rank(tokens, 64, 64, 4, FULL)
        assert folds_output(compute, work, tokens, (64, 64), scaled=True, like=LIKE_FULL) is (compute == "folded")
        assert folds_gradient(compute, work, tokens, (64, 64), scaled=True, like=LIKE_FULL) is (compute == "folded")


def test_the_square_update_folds_sooner() -> None:
    """Its maps pass many times over what they turn, and forming the weight passes over it once."""
    shape = (512, 512)
    work = Square(512, 512, 128, turn=True).work(128, (LIKE_FULL,), FULL)
    assert folds_output("auto", work, 128, shape, scaled=False, like=LIKE_FULL)
    assert not folds_output("auto", low_rank(128, *shape, 16, FULL), 128, shape, scaled=False, like=LIKE_FULL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["low rank", "rotation", "sharing"])
def test_a_folded_weight_is_rounded_once(dtype: torch.dtype, scaled: bool, kind: str) -> None:
    out_features, in_features = 40, 56
    work = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(out_features, in_features).to(dtype)
    before = weight.clone()
    ratio = 1 + torch.rand(out_features).to(work) / 8 if scaled else None
    update: LowRank | Square
    tensors: tuple[torch.Tensor, ...]
    if kind == "low rank":
        update = LowRank(1.5)
        tensors = (torch.randn(3, in_features).to(work) / 8, torch.randn(out_features, 3).to(work) / 8)
        delta = 1.5 * tensors[1].double() @ tensors[0].double()
    else:
        update = Square(in_features, out_features, 16, turn=kind == "rotation")
        tensors = (torch.randn(16, 16).to(work) / 8,)
        delta = update.delta((tensors[0].double(),))
    want = weight.double() + delta
    if ratio is not None:
        want = want * ratio.double().unsqueeze(1)
    got = update.fold(weight, ratio, tensors)
    assert got.dtype == dtype
    # Half a unit of the result for its one rounding, and a few roundings of the dtype that it was computed in (angles
    # of the rotation are float32 even there).
    slack = 0.5 * torch.finfo(dtype).eps * want.abs() + 16 * torch.finfo(work).eps * 2
    assert bool(((got.double() - want).abs() <= slack).all())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_blocks_of_rows_give_the_same_weight(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, ratio = torch.randn(40, 56).bfloat16(), 1 + torch.rand(40) / 8
    tensors = (torch.randn(3, 56), torch.randn(40, 3))
    whole = LowRank(1.5).fold(weight, ratio, tensors)
    monkeypatch.setattr(plain, "_BLOCK", rows * 56)
    assert torch.allclose(LowRank(1.5).fold(weight, ratio, tensors), whole, rtol=2**-8)


def test_passes_of_a_square_update() -> None:
    """Counted by hand for k = 2 in float32, where k rows weigh 2 / 20. On 5 x 7 the four chunks feed three groups, in
    two rounds; on 9 x 2 one chunk feeds one group of two, which is laid side by side until nine are full. M is turned
    in 8 passes over its rows of all inputs, and repeated in 2."""
    square = Square(in_features=7, out_features=5, side=2, turn=True)
    assert square.work(1, (LIKE_FULL,), FULL) == pytest.approx((29 + 0.7, 112 + 1.76 * 7, 112 + 35 * 5 / 3))
    assert square.work(3, (LIKE_FULL,), FULL) == pytest.approx((112 + 5.28 * 10, 112 + 5.28 * 7, 112 + 35 * 5 / 3))
    wide = Square(in_features=2, out_features=9, side=2, turn=True)
    assert wide.work(3, (LIKE_FULL,), FULL) == pytest.approx((32 + 5.28 * 2 + 3 * 11, 32 + 5.28 * 2, 32 + 54))
    shared = Square(in_features=7, out_features=5, side=2, turn=False)
    assert shared.work(3, (LIKE_FULL,), FULL) == pytest.approx((87 + 0.6, 87 + 0.6, 105 + 28))


@pytest.mark.parametrize(("passes", "turning"), [(cost.FUSED, 4096), (cost.SEPARATE, 32768)])
def test_a_device_has_passes_of_its_own(passes: cost.Passes, turning: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Llama-8B's square layers in bfloat16, rank 16: with fused passes a weight is formed as soon as that takes
    fewer bytes than adding to the gradient; by torch's operations, which widen it first, later. No measurement."""
    monkeypatch.setitem(cost._KINDS, "cpu", passes)
    shape = (4096, 4096)
    turns = []
    for tokens in SIZES:
        work = low_rank(tokens, *shape, 16, HALF)
        turns.append(folds_gradient("auto", work, tokens, shape, scaled=True, like=LIKE_HALF))
        assert not folds_output("auto", work, tokens, shape, scaled=True, like=LIKE_HALF), "never rounded"
        assert cost.full_digits_for_few(1, HALF, "cpu") == HALF, (
            "a product of few tokens is no slower in half precision"
        )
    # Of 10 x 20, in float32: a ratio is in the passes that are fused, else it takes one more over what it scales.
    for tokens, folds in ((20, False), (30, passes is cost.SEPARATE)):
        work = Work(product=100, gradient=100, fold=100)
        assert folds_output("auto", work, tokens, (10, 20), scaled=True, like=LIKE_FULL) is folds
        assert not folds_output("auto", work, tokens, (10, 20), scaled=False, like=LIKE_FULL)
    assert turns == sorted(turns), "where a weight is formed for some tokens, it is for more"
    assert turns[-1]
    assert SIZES[turns.index(True)] == turning


def test_devices_are_told_apart_by_their_kind() -> None:
    assert cost.passes_on("cpu") is cost.passes_on(torch.device("cpu")) is cost.PROCESSOR
    assert cost.passes_on("cuda:1") is cost.passes_on(torch.device("cuda", 0)) is cost.FUSED
    assert cost.passes_on("mps") is cost.SEPARATE


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_few_tokens_get_other_digits_in_half_precision_alone(device: str) -> None:
    for dtype in (FULL, torch.float64):
        assert cost.full_digits_for_few(1, dtype, device) == dtype
    assert cost.full_digits_for_few(1, HALF, device) == (FULL if device == "cpu" else HALF)
    assert cost.full_digits_for_few(1000, HALF, device) == HALF
