"""The entrance: which kind of result rows get, what it holds, and what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation_cases import example, llama, markov_chain
from trimtab.data.rows import Example
from trimtab.errors import DataError
from trimtab.evaluation.evaluate import evaluate, write
from trimtab.tasks import Head

Make = Callable[..., list[Example]]


def test_choices(tokenizer: Any, questions: Make) -> None:
    model, rows = llama(), questions(["good", "bad", "plain"], 20)
    found = evaluate(Head(model), tokenizer, rows, name="news", choices="infer")
    result = found.result
    assert list(result) == [
        *("kind", "dataset", "rows", "choices", "accuracy", "macro_f1", "weighted_f1", "per_class", "confusion"),
        *("majority", "perplexity", "seconds"),
    ]
    assert (result["kind"], result["dataset"], result["rows"]) == ("choice", "news", 20)
    assert result["choices"] == ["bad", "good", "plain"]
    assert sum(map(sum, result["confusion"])) == 20
    right = [row["correct"] for row in found.predictions]
    assert result["accuracy"] == pytest.approx(sum(right) / 20)
    loss = 0.0
    for number, (row, prediction) in enumerate(zip(rows, found.predictions, strict=True), start=1):
        assert list(prediction) == ["row", "prompt", "answer", "predicted", "correct", "scores"]
        assert (prediction["row"], prediction["prompt"], prediction["answer"]) == (number, row.prompt, row.answer)
        scores = prediction["scores"]
        assert list(scores) == result["choices"]
        assert prediction["predicted"] == max(scores, key=scores.__getitem__)
        assert prediction["correct"] == (prediction["predicted"] == row.answer)
        loss -= scores[row.answer]
    # Each of these answers is one token.
    assert result["perplexity"] == pytest.approx(math.exp(loss / 20), rel=1e-4)


def test_choices_keep_the_order_given(tokenizer: Any, questions: Make) -> None:
    rows = questions(["good", "bad"], 4)
    found = evaluate(Head(llama()), tokenizer, rows, name="news", choices=["plain", "good", "bad"])
    assert found.result["choices"] == ["plain", "good", "bad"]
    with pytest.raises(DataError, match=r"row 2: has the answer 'bad'"):
        evaluate(Head(llama()), tokenizer, rows, name="news", choices=["plain", "good"])


@pytest.mark.parametrize("choices", [None, "infer"])
def test_rows_with_choices_of_their_own(tokenizer: Any, questions: Make, choices: Any) -> None:
    rows = [
        replace(row, choices=("good", "a bad firm", "plain")[: 2 + at % 2])
        for at, row in enumerate(questions(["good"], 20))
    ]
    found = evaluate(Head(llama()), tokenizer, rows, name="exam", choices=choices)
    result = found.result
    assert list(result) == [
        *("kind", "dataset", "rows", "accuracy", "accuracy_norm", "chance", "perplexity", "seconds")
    ]
    assert result["kind"] == "multiple_choice"
    assert result["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    right = by_length = 0
    for row, prediction in zip(rows, found.predictions, strict=True):
        scores = prediction["scores"]
        assert tuple(scores) == row.choices
        assert prediction["predicted"] == max(scores, key=scores.__getitem__)
        assert prediction["correct"] == (prediction["predicted"] == row.answer)
        right += prediction["correct"]
        by_length += max(scores, key=lambda choice: scores[choice] / len(choice)) == row.answer
    assert (result["accuracy"], result["accuracy_norm"]) == (right / 20, by_length / 20)
    assert right != by_length, "the test needs rows where length decides"
    # Written instead, they are open answers; and a closed set that is named comes before the rows' own.
    written = evaluate(Head(llama()), tokenizer, rows[:3], name="exam", generate=True, max_new_tokens=2)
    assert written.result["kind"] == "generation"
    named = evaluate(Head(llama()), tokenizer, rows[:3], name="exam", choices=["good", "a bad firm"])
    assert named.result["kind"] == "choice"


@pytest.mark.parametrize("choices", [None, "infer"])
def test_open_answers(tokenizer: Any, choices: Any) -> None:
    (good,), (colon,), (dot,) = (tokenizer(text)["input_ids"] for text in (" good", ":", "."))
    model = markov_chain(tokenizer, {colon: good, good: tokenizer.eos_token_id, dot: dot})
    rows = [example("so: ", "Good", 1), example("or: ", "bad", 2), example("no.", " ...", 3), example("a: ", "good", 4)]
    found = evaluate(Head(model), tokenizer, rows, name="open", choices=choices, max_new_tokens=4)
    assert list(found.result) == ["kind", "dataset", "rows", "exact_match", "unusable", "perplexity", "seconds"]
    assert found.result["kind"] == "generation"
    assert found.result["exact_match"] == 0.5
    assert found.result["unusable"] == 0.25
    assert found.predictions[2] == {
        "row": 3,
        "prompt": "no.",
        "answer": " ...",
        "predicted": "....",
        "correct": False,
        "usable": False,
    }
    assert [row["correct"] for row in found.predictions] == [True, False, False, True]


def test_plain_texts(tokenizer: Any) -> None:
    rows = [example("", None, n, text) for n, text in enumerate(["the profit rose .", "sales fell by a third"])]
    steps: list[tuple[int, int]] = []
    found = evaluate(
        Head(llama()),
        tokenizer,
        rows,
        name="texts",
        choices="infer",
        progress=lambda done, of: steps.append((done, of)),
    )
    assert list(found.result) == ["kind", "dataset", "rows", "perplexity", "tokens", "seconds"]
    assert found.result["kind"] == "perplexity"
    assert found.predictions == []
    assert steps == [(2, 2)]


def test_modes_and_gradients_stay_as_they_were(tokenizer: Any, questions: Make) -> None:
    model = llama().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    for choices in (["good", "bad"], None):
        evaluate(Head(model), tokenizer, questions(["good", "bad"], 4), name="news", choices=choices, max_new_tokens=2)
        assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    with pytest.raises(DataError):
        evaluate(Head(model), tokenizer, questions(["good"], 4), name="news", choices=["bad", "plain"])
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off(tokenizer: Any, questions: Make) -> None:
    model = llama(attention_dropout=0.9).train()
    head, rows = Head(model), questions(["good", "bad"], 6)
    first, second = (evaluate(head, tokenizer, rows, name="news", choices="infer").predictions for _ in range(2))
    assert first == second


def test_a_model_may_be_shorter_than_a_row(tokenizer: Any) -> None:
    """The model's own number of positions limits rows, whatever the caller allows."""
    rows = [example("News: " + "the profit rose " * 60 + "\nAnswer: ", answer) for answer in ("good", "bad")]
    found = evaluate(Head(llama()), tokenizer, rows, name="long", choices=["good", "bad"], max_length=10_000)
    assert found.result["rows"] == 2
    assert evaluate(Head(llama()), tokenizer, rows, name="long", max_new_tokens=4).result["rows"] == 2


def test_no_rows_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="news: there are no rows"):
        evaluate(Head(llama()), tokenizer, [], name="news")


def test_what_is_written(tmp_path: Path, tokenizer: Any, questions: Make) -> None:
    found = evaluate(Head(llama()), tokenizer, questions(["good", "bad"], 10), name="news", choices="infer")
    write(found, tmp_path, "before")
    assert json.loads((tmp_path / "evaluation" / "news.before.json").read_text(encoding="utf-8")) == found.result
    lines = (tmp_path / "predictions" / "news.before.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == found.predictions
    texts = evaluate(Head(llama()), tokenizer, [example("", None, 1, "the profit rose")], name="texts")
    write(texts, tmp_path, "after")
    assert (tmp_path / "evaluation" / "texts.after.json").is_file()
    assert not (tmp_path / "predictions" / "texts.after.jsonl").exists()
