"""Forms with a question and its answer in plain text: templates, system texts, history, numbers, ends of their own."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data import forms
from trimtab.data.forms import read_examples
from trimtab.data.rows import Example
from trimtab.data.tokens import encode
from trimtab.errors import DataError
from trimtab.models.causal_head import IGNORED
from trimtab.notes import Notes

Writer = Callable[..., str]
BEGINNING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


@pytest.fixture
def read(jsonl: Writer, tmp_path: Path, tokenizer: Any) -> Callable[..., tuple[Example, list[str]]]:
    """The one example of a row, and what was told."""

    def read(row: dict[str, Any], tokenizer: Any = tokenizer, **options: Any) -> tuple[Example, list[str]]:
        notes = Notes()
        (example,) = read_examples(jsonl(row), tokenizer, root=tmp_path, notes=notes, **options)
        return example, list(notes)

    return read


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "How high?", "answer": "2.5 m"}, "Question: How high?\nAnswer: ", "2.5 m"),
        (
            {"question": "How high?", "context": "Tides.", "answer": "2.5 m"},
            "Tides.\n\nQuestion: How high?\nAnswer: ",
            "2.5 m",
        ),
        (
            {"instruction": "Sum up.", "context": "", "response": "Tides."},
            f"{BEGINNING}### Instruction:\nSum up.\n\n### Response:\n",
            "Tides.",
        ),
        ({"text": "It rose.\n", "label": "up"}, "It rose.\nLabel: ", "up"),
        ({"prompt": "How high?\n", "completion": "2.5 m", "system": "Be brief."}, "Be brief.\n\nHow high?\n", "2.5 m"),
        (
            {"instruction": "Sum up.", "output": "Tides.", "system": "Be brief."},
            "Be brief.\n\n### Instruction:\nSum up.\n\n### Response:\n",
            "Tides.",
        ),
        ({"question": "Q", "answer": "a", "system": "Be brief."}, "Be brief.\n\nQuestion: Q\nAnswer: ", "a"),
    ],
)
def test_prompts(read: Callable[..., Any], row: dict[str, Any], prompt: str, answer: str) -> None:
    example, _ = read(row)
    assert (example.prompt, example.answer, example.text) == (prompt, answer, prompt + answer)
    assert example.ends


def test_what_is_asked_later_is_put_as_in_the_rows(tokenizer: Any, read: Callable[..., Any]) -> None:
    for row, said in (
        ({"question": "How high?", "answer": "2.5 m"}, "How high?"),
        ({"instruction": "How high?", "response": "2.5 m"}, "How high?"),
        ({"text": "It rose.", "label": "up"}, "It rose."),
    ):
        for system in ("", "Be brief."):
            example, _ = read({**row, "system": system})
            assert forms.find(example.form).prompt(said, tokenizer, system=system) == example.prompt


def test_history_is_put_as_the_question_is_and_its_answers_are_trained(
    read: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    row = {"instruction": "And now?", "output": "3 m", "history": [["How high?", "2.5 m "]]}
    example, notes = read(row)
    assert example.text == (
        f"{BEGINNING}### Instruction:\nHow high?\n\n### Response:\n2.5 m<|eos|>\n\n"
        "### Instruction:\nAnd now?\n\n### Response:\n3 m"
    )
    assert [example.text[start:stop] for start, stop in example.trained] == ["2.5 m<|eos|>", "3 m"]
    assert (example.answer, notes) == ("3 m", [])
    # Without an end token nothing could teach where an earlier answer stops.
    endless = make_tokenizer()
    endless.eos_token = None
    assert len(read(row, endless)[0].trained) == 1
    for wrong in ("How high?", [["How high?"]], [["How high?", 3]]):
        with pytest.raises(DataError, match="line 1: 'history' must be a list of"):
            read({**row, "history": wrong})


NUMBERS = [(7, "7"), (-0.5, "-0.5"), (1e-05, "1e-05"), (True, "true"), (0, "0")]


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers_and_truth_values_are_answers(read: Callable[..., Any], value: Any, text: str) -> None:
    example, notes = read({"prompt": "How many?", "completion": value})
    assert example.answer == text
    assert notes[0].startswith("numbers or truth values under 'completion', which are read as text: 1 row")
    assert read({"text": "It rose.", "label": value})[0].answer == text
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": value}]
    assert read({"messages": messages})[0].answer == text


def test_decimal_numbers_of_parquet_are_answers(tokenizer: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["How much?"], "completion": [Decimal("1.50")]}), tmp_path / "rows.parquet")
    (example,) = read_examples("rows.parquet", tokenizer, root=tmp_path)
    assert example.answer == "1.50"


@pytest.mark.parametrize("end", ["<|eos|>", " <|eos|>\n", "<|eos|><|eos|>"])
def test_an_end_that_stands_in_the_row_is_not_doubled(read: Callable[..., Any], tokenizer: Any, end: str) -> None:
    for plain, ended in (
        ({"prompt": "Answer:", "completion": " neutral"}, {"prompt": "Answer:", "completion": f" neutral{end}"}),
        ({"question": "Q", "answer": "neutral"}, {"question": "Q", "answer": f"neutral{end}"}),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "neutral"}]},
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": f"neutral{end}"}]},
        ),
    ):
        example, notes = read(ended)
        assert example == read(plain)[0]
        assert notes[0].startswith("answers that end with an end token of their own")


def test_another_end_than_the_tokenizers_stays_the_only_one(read: Callable[..., Any], tokenizer: Any) -> None:
    # A prompt in a chat format, written by hand: its turn ends with the format's own mark.
    example, _ = read({"prompt": "<|im_start|>assistant\n", "completion": "neutral<|im_end|>"})
    assert (example.answer, example.ends) == ("neutral", False)
    row = encode(example, tokenizer, None)
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "neutral<|im_end|>"
    # A text that no token of this tokenizer stands for is part of the answer.
    assert read({"prompt": "Q", "completion": "neutral</s>"})[0].answer == "neutral</s>"
    with pytest.raises(DataError, match="an end token and nothing before it"):
        read({"prompt": "Q", "completion": "<|eos|>"})


def test_a_text_that_ends_itself(read: Callable[..., Any], tokenizer: Any) -> None:
    row = encode(read({"text": "Profit rose.<|eos|>\n"})[0], tokenizer, None)
    assert row == encode(read({"text": "Profit rose."})[0], tokenizer, None)


def test_what_becomes_of_a_label_is_told(read: Callable[..., Any]) -> None:
    _, notes = read({"text": "It rose.", "label": "up"})
    assert notes == [
        "'label' is learnt as the answer to 'text': 1 row in rows.jsonl, line 1. data.form: text learns the texts alone"
    ]
    example, notes = read({"text": "It rose.", "label": "up"}, form="text")
    assert example.text == "It rose."
    assert notes == ["keys that are not used: 'label' (1 row); the first row is rows.jsonl, line 1"]


def test_keys_that_are_not_used_are_named_once_with_their_rows(jsonl: Writer, tmp_path: Path, tokenizer: Any) -> None:
    rows = jsonl(
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b", "topic": "x", "tools": []},
        {"prompt": "a", "completion": "b", "topic": "x", "source": {"page": 3}, "note": "", "other": None},
    )
    notes = Notes()
    read_examples(rows, tokenizer, root=tmp_path, notes=notes)
    assert list(notes) == [
        "keys that are not used: 'topic' (2 rows), 'source' (1 row); the first row is rows.jsonl, line 2"
    ]
