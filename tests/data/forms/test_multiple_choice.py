"""Rows with choices of their own: both spellings, and every way in which such a row can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.data.forms import read_examples
from trimtab.data.forms.multiple_choice import read_question
from trimtab.errors import DataError

Writer = Callable[..., str]

QUESTION = "Which lamp marks the left bank?"
ROW = {"question": QUESTION, "choices": ["the red one", "the green one", "the white one"], "answer": "the green one"}
LABELLED = {
    "question": QUESTION,
    "choices": {"text": ROW["choices"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}


def spelled_out(*choices: str, right: int = 2, word: str = "Answer") -> dict[str, Any]:
    """A row in LLM-Adapters' form."""
    listed = " ".join(f"{word}{number}: {choice}" for number, choice in enumerate(choices, 1))
    names = "/".join(f"{word.lower()}{number}" for number in range(1, len(choices) + 1))
    asked = (
        f"Please choose the correct {word.lower()} to the question: {QUESTION}\n\n{listed}\n\nAnswer format: {names}"
    )
    answer = f"{word.lower()}{right}"
    return {"instruction": asked, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        ROW | {"answer": " the green one "},
        ROW | {"answer": 1},
        ROW | {"answer": "B"},
        LABELLED,
        LABELLED | {"choices": {"text": ROW["choices"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        spelled_out("the red one", "the green one", "the white one"),
        spelled_out("the red one", "the green one", "the white one", word="Solution"),
    ],
)
def test_every_spelling_gives_one_example(row: dict[str, Any], jsonl: Writer, tmp_path: Path) -> None:
    (example,) = read_examples(jsonl(row), None, root=tmp_path, form="multiple_choice")
    assert example.prompt == f"Question: {QUESTION}\nAnswer: "
    assert example.text == f"Question: {QUESTION}\nAnswer: the green one"
    assert [example.text[start:end] for start, end in example.trained] == [" the green one"]
    assert (example.answer, example.choices) == ("the green one", ("the red one", "the green one", "the white one"))
    assert example.ends


def test_the_other_spellings_of_the_commonsense_sets_are_read() -> None:
    """BoolQ names its two answers in the question; WinoGrande has no blank line before the answer's format."""
    asked = "Please answer the following question with true or false, question: is fog wet?\n\nAnswer format: x"
    boolq = {"instruction": asked, "input": "", "output": "the correct answer is true", "answer": "true"}
    assert read_question(boolq) == ("is fog wet?", ("true", "false"), "true")
    with pytest.raises(ValueError, match="'answer' must be one of true, false"):
        read_question({**boolq, "answer": "yes"})
    blank = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    filled = f"{blank}Ann had the boat and _ the oars.\n\nOption1: Ann Option2: Bo Answer format: option1/option2"
    winogrande = {"instruction": filled, "input": "", "output": "the correct answer is option2", "answer": "option2"}
    assert read_question(winogrande) == ("Ann had the boat and _ the oars.", ("Ann", "Bo"), "Bo")


def test_a_choice_may_hold_digits_colons_and_lines(jsonl: Writer, tmp_path: Path) -> None:
    choices = ("12: 30", "at Answer Bay", "one\n\ntwo", "Answers: 4")
    (example,) = read_examples(jsonl(spelled_out(*choices)), None, root=tmp_path, form="multiple_choice")
    assert example.choices == choices


def test_equal_choices_are_one() -> None:
    found = read_question(spelled_out("sky", "roots", "sky", "leaves", right=3))
    assert (found.choices, found.answer) == (("sky", "roots", "leaves"), "sky")
    by_place = read_question({"question": "Q", "choices": ["a", "b", "b"], "answer": 2})
    assert (by_place.choices, by_place.answer) == (("a", "b"), "b")


def test_the_form_of_llm_adapters_must_be_named(jsonl: Writer, tmp_path: Path) -> None:
    row = jsonl(spelled_out("red", "green"))
    assert read_examples(row, None, root=tmp_path)[0].form == "alpaca"
    assert read_examples(row, None, root=tmp_path)[0].choices == ()
    assert read_examples(jsonl(ROW), None, root=tmp_path)[0].form == "multiple_choice"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            ROW | {"answer": "the blue one"},
            "'answer' must be one of the red one, the green one, the white one, or a num",
        ),
        (ROW | {"answer": 3}, "or a number from 0 to 2, or a letter, but is 3"),
        (ROW | {"answer": -1}, "from 0 to 2, or a letter, but is -1"),
        (ROW | {"answer": True}, "but is True"),
        (ROW | {"answer": None}, "'answerKey' must be one of .* but is None"),
        (ROW | {"choices": "red"}, "'choices' must be a list of texts, but is str"),
        (ROW | {"choices": ["red", 3], "answer": "red"}, "each of its choices must be a text"),
        (ROW | {"choices": ["red", " "], "answer": "red"}, "each of its choices must be a text"),
        (ROW | {"choices": ["red", "red"], "answer": "red"}, "at least two different choices, but has 1"),
        (ROW | {"question": " "}, "'question' must be a text that is not empty"),
        (LABELLED | {"answerKey": "D"}, "'answerKey' must be one of A, B, C, but is 'D'"),
        (LABELLED | {"answerKey": 1}, "'answerKey' must be one of A, B, C, but is 1"),
        (LABELLED | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "as many 'label' as 'text'"),
        (spelled_out("red", "green", right=3), "'answer' must be one of answer1, answer2, but is 'answer3'"),
        ({"instruction": "Which one?", "answer": "answer1"}, "'instruction' is not of the form"),
        ({"answer": "answer1"}, "'choices' must be a list of texts, but is NoneType"),
    ],
)
def test_what_is_wrong_is_said_with_its_row(row: dict[str, Any], reason: str, jsonl: Writer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read_examples(jsonl(ROW, row), None, root=tmp_path, form="multiple_choice")
    assert "rows.jsonl, line 2" in str(caught.value)


@pytest.mark.parametrize(("name", "rows", "choices"), [("ARC-Easy", 2376, 9501), ("openbookqa", 500, 2000)])
def test_the_real_sets_are_read_whole(name: str, rows: int, choices: int) -> None:
    folder = Path(__file__).parents[4] / "shared" / "data" / "commonsense" / name
    if not folder.is_dir():
        pytest.skip(f"needs {name} in ../shared")
    found = read_examples("test.json", None, root=folder, form="multiple_choice")
    assert len(found) == rows
    assert sum(len(row.choices) for row in found) == choices
    said = json.loads((folder / "test.json").read_text())
    for row, example in zip(said, found, strict=True):
        number = row["answer"].removeprefix("answer")
        assert f"Answer{number}: {example.answer}" in row["instruction"]
