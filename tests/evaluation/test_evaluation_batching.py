"""Batches of like lengths, and how near two scores may be before the batch decides between them."""

from __future__ import annotations

import pytest
import torch

from evaluation_cases import llama
from trimtab.data.batches import TOKENS, by_length
from trimtab.evaluation.choice import _padded_right
from trimtab.evaluation.generation import padded_left
from trimtab.tasks import Head

CPU = torch.device("cpu")


def test_every_row_once_and_the_longest_first() -> None:
    lengths = [5, 9, 1, 9, 7, 3, 2]
    batches = by_length(lengths, 3)
    assert batches == [[1, 3, 4], [0, 5, 6], [2]]
    assert by_length([], 3) == []
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        by_length(lengths, 0)


def test_long_rows_come_in_smaller_batches() -> None:
    lengths = [TOKENS // 2] * 3 + [2 * TOKENS] + [TOKENS // 4] * 5
    assert [len(batch) for batch in by_length(lengths, 16)] == [1, 2, 2, 4]
    assert by_length(lengths, 16)[0] == [3]


def test_padding() -> None:
    assert _padded_right([[1, 2, 3], [4]], CPU).tolist() == [[1, 2, 3], [4, 0, 0]]
    ids, mask = padded_left([[1, 2, 3], [4]], 9, CPU)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_margin_follows_the_coarsest_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(llama())
    assert head.tie_margin == Head(llama().double()).tie_margin == 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.tie_margin == 0.625
    assert Head(llama().half()).tie_margin == pytest.approx(0.078125)
    mixed = Head(llama().bfloat16())
    mixed.model.lm_head.float()
    assert mixed.tie_margin == 0.625
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert head.tie_margin == 0.625
