"""MoRA: the side of its square, and that nothing of it is dead. Outputs and gradients are in the contract suite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import trimtab
from trimtab import bases, methods
from trimtab.methods import mora


@pytest.mark.parametrize(
    ("out_features", "in_features", "rank", "form", "side"),
    [
        (4096, 4096, 8, "rotation", 256),  # sqrt(8192 * 8)
        (1024, 4096, 8, "rotation", 202),  # sqrt(40960) = 202.4
        (4096, 4096, 256, "sharing", 1448),  # sqrt(2097152) = 1448.2
        (576, 1536, 7, "sharing", 122),  # sqrt(14784) = 121.6, rounded up
        (10, 15, 1, "sharing", 5),
        (10, 15, 1, "rotation", 4),  # pairs of features: even
    ],
)
def test_side(out_features: int, in_features: int, rank: int, form: str, side: int) -> None:
    options = mora.Options(rank=rank, form=form)
    assert mora.side(out_features, in_features, options) == side
    lora = rank * (out_features + in_features)
    assert abs(side**2 - lora) <= 2.5 * math.sqrt(lora), "it costs what LoRA of that rank costs, to the nearest square"


def attached(out_features: int, in_features: int, **options: object) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
    trimtab.attach(model, trimtab.Rule(match="0", method="mora", **options))
    return model


# 4096 -> 1024 and 1024 -> 4096 at rank 8, an eighth of the size; square; sides that k does not divide.
SHAPES = [(128, 512, 1), (512, 128, 1), (64, 64, 4), (50, 70, 3), (33, 20, 2), (20, 33, 2)]


@pytest.mark.parametrize("form", ["rotation", "sharing"])
@pytest.mark.parametrize(("out_features", "in_features", "rank"), SHAPES)
def test_every_input_counts_and_all_of_m_learns(out_features: int, in_features: int, rank: int, form: str) -> None:
    model = attached(out_features, in_features, rank=rank, form=form)
    matrix = model[0].adapter.M
    assert not matrix.any()
    x = torch.randn(8, in_features, dtype=torch.float32)
    model(x).backward(torch.randn(8, out_features))
    side = matrix.shape[0]
    assert matrix.grad is not None
    # Rows beyond the outputs and columns beyond the inputs of a k that does not fit have nothing to do.
    assert bool(matrix.grad[: min(side, out_features), : min(side, in_features)].ne(0).all())

    with torch.no_grad():
        matrix.normal_()
        base = model[0].base.weight.clone()
        influence = model(torch.eye(in_features)) - base.t()  # [in, out]: what each input does through the update
    assert bool((influence.abs().amax(1) > 1e-3).all()), "an input without influence"
    assert bool((influence.abs().amax(0) > 1e-3).all()), "an output that nothing reaches"


def test_the_update_can_have_full_rank() -> None:
    """The point of a square: at the cost of rank 1, an update of rank k."""
    model = attached(64, 64, rank=1, form="sharing")
    with torch.no_grad():
        model[0].adapter.M.normal_()
    delta = trimtab.effective_weight(model, "0") - model[0].base.weight
    assert model[0].adapter.M.shape == (11, 11)
    assert torch.linalg.matrix_rank(delta, tol=1e-4) == 11


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((6, 10), {"rank": 7}, "rank 7 is larger than the matrix"),
        ((2, 100), {"rank": 5}, "rank 5 is larger than the matrix"),  # though its square of 22 would fit
        ((8, 8), {"rank": 8}, "a square of 11 x 11 on a weight of 8 x 8"),  # sqrt(128) = 11.3, down
        ((1, 1), {"rank": 1}, "leaves a square of side"),
    ],
)
def test_squares_that_do_not_fit(shape: tuple[int, int], options: dict[str, int], words: str) -> None:
    form = "rotation" if shape == (1, 1) else "sharing"
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    with pytest.raises(trimtab.PlanError) as caught:
        trimtab.attach(model, trimtab.Rule(match="0", method="mora", form=form, **options))
    assert words in str(caught.value)
    assert type(model[0]) is nn.Linear
    base = bases.find(model[0])
    assert base is not None
    with pytest.raises(trimtab.PlanError) as caught:
        methods.method_class("mora")(base, methods.options_class("mora")(form=form, **options))
    assert words in str(caught.value), "and where the adapter is made by hand"


def test_there_is_no_scale() -> None:
    assert not {"alpha", "rank_stabilised"} & set(methods.options_class("mora").model_fields)
    model = attached(4, 4, rank=1, form="sharing")
    with torch.no_grad():
        model[0].adapter.M.fill_(0.5)
    assert torch.allclose(trimtab.effective_weight(model, "0"), model[0].base.weight + 0.5)


def test_its_matrix_follows_no_layer_to_another_size() -> None:
    assert methods.method_class("lora").can_refit
    assert not methods.method_class("mora").can_refit, "places of M follow from the sizes"
