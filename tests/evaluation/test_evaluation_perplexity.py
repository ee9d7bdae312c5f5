"""Perplexity over trained tokens, against full logits in float64, one row at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evaluation_cases import example, gpt2, llama
from trimtab.data.rows import Example
from trimtab.data.tokens import encode
from trimtab.errors import ModelError
from trimtab.evaluation import evaluate
from trimtab.evaluation.evaluate import checked
from trimtab.metrics import measure
from trimtab.outcomes import Outcomes
from trimtab.surgery.contexts import evaluating
from trimtab.tasks import Head

Make = Callable[..., list[Example]]

TEXTS = [
    "the profit of the firm rose by a third .",
    "sales fell",
    "the meeting is on Monday , and the shop is closed .",
]


def token_loss(head: Head, *inputs: Any, **settings: Any) -> tuple[float, int]:
    """As `evaluate` calls it."""
    with evaluating(head.model):
        return evaluate.token_loss(head, *inputs, **settings)


def reference(model: Any, tokenizer: Any, rows: list[Example]) -> tuple[float, int]:
    exact, total, tokens = copy.deepcopy(model).double(), 0.0, 0
    for row in rows:
        encoded = encode(row, tokenizer, None)
        with torch.no_grad():
            nats = exact(torch.tensor([encoded["input_ids"]])).logits[0].log_softmax(-1)
        for at, label in enumerate(encoded["labels"]):
            if label != -100:
                total, tokens = total - float(nats[at - 1, label]), tokens + 1
    return total, tokens


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_weighs_tokens_and_not_rows(make: Any, batch_size: int, tokenizer: Any, questions: Make) -> None:
    model = make()
    for rows in ([example("", None, n, text) for n, text in enumerate(TEXTS)], questions(["a good one", "bad"], 7)):
        loss, tokens = token_loss(Head(model), tokenizer, rows, batch_size=batch_size)
        expected, count = reference(model, tokenizer, rows)
        assert tokens == count
        assert loss == pytest.approx(expected, rel=1e-5)  # sums in float32


def test_the_mean_is_of_tokens() -> None:
    assert measure("perplexity", Outcomes(loss=6.0, tokens=3))["perplexity"] == pytest.approx(math.exp(2.0))


def test_no_float_is_too_small_for_a_bad_model() -> None:
    assert math.isfinite(measure("perplexity", Outcomes(loss=1e6, tokens=1))["perplexity"])
    with pytest.raises(ModelError, match="nan, not a number"):
        checked(math.nan, 3)


def test_a_limit_cuts_rows(tokenizer: Any) -> None:
    _, tokens = token_loss(Head(llama()), tokenizer, [example("", None, 1, TEXTS[0])], max_length=6)
    assert tokens == 5
