"""Which rows go through many updates at once, and which need a pass of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab import bases
from trimtab.ops import mixed_training
from trimtab.ops.frozen_linear import Operands
from trimtab.ops.linear_map import MATRIX
from trimtab.ops.low_rank import LowRank
from trimtab.ops.mixed_rows import MixedProduct, Part, fits
from trimtab.ops.mixed_training import Trained, trains_together
from trimtab.ops.square import Square
from trimtab.ops.update import TurnedUpdate

ROWS = torch.randn(5, 8)


class Programs:
    """Takes float32."""

    @staticmethod
    def takes(*tensors: Tensor | None) -> bool:
        assert all(tensor is None or isinstance(tensor, Tensor) for tensor in tensors)
        return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


def low_rank(rank: int, through: Any = MATRIX, **changes: Any) -> Operands:
    tensors = torch.randn(rank, 8), torch.randn(6, rank)
    made = Operands(
        weight=torch.randn(6, 8), bias=None, ratio=None, update=LowRank(0.5), tensors=tensors, through=through
    )
    return made._replace(**changes)


def convolution() -> Any:
    base = bases.find(nn.Conv1d(8, 6, 1))
    assert isinstance(base, bases.WeightBase)
    return base.through


SQUARE = {"update": Square(8, 6, 4, False), "tensors": (torch.randn(4, 4),)}
BARE = {"update": None, "tensors": ()}
OF_A_CONVOLUTION = low_rank(2, convolution())
CASES = {  # what some rows are multiplied with, whether they can be a segment, and whether one that trains
    "thin": (low_rank(2), True, True),
    "as many ranks as a program holds": (low_rank(32), True, True),
    "one more": (low_rank(33), True, False),
    "nothing": (low_rank(2, **BARE), True, True),
    "square": (low_rank(2, **SQUARE), True, True),
    "another update": (low_rank(2, update=TurnedUpdate(LowRank(0.5))), False, False),
    "a convolution": (OF_A_CONVOLUTION, False, False),
    "nothing, of a convolution": (OF_A_CONVOLUTION._replace(**BARE), False, False),
    "a bias that no program takes": (low_rank(2, bias=torch.randn(6).half()), False, False),
    "factors that no program takes": (
        low_rank(2, tensors=(torch.randn(2, 8).half(), torch.randn(6, 2).half())),
        False,
        False,
    ),
}


def test_which_rows_can_be_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_training, "segments_for", lambda rows: Programs)
    for name, (operands, fit, train) in CASES.items():
        assert fits(operands, Programs, ROWS) is fit, name
        for together in ([operands], [operands, low_rank(1)], [low_rank(1), operands]):
            found = trains_together(ROWS, [Trained(one, None, None) for one in together])
            assert found is train, name
        assert not fits(operands, Programs, ROWS.half()), name
    for rows in (ROWS[:0], torch.ones(3, 8, dtype=torch.long)):
        assert trains_together(rows, [Trained(low_rank(2), None, None)]) is False
    monkeypatch.setattr(mixed_training, "segments_for", lambda rows: None)
    assert trains_together(ROWS, [Trained(low_rank(2), None, None)]) is False


def test_a_batch_of_one_update() -> None:
    operands = low_rank(2, bias=torch.randn(6))
    a, b = operands.tensors
    got = MixedProduct([Part(slice(0, 5), operands)], None)(ROWS, operands.weight, MATRIX)
    assert torch.allclose(got, ROWS @ (operands.weight + 0.5 * b @ a).t() + operands.bias, atol=1e-5)
