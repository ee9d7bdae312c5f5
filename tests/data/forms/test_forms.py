"""Forms of rows: how each is recognised and joined, and every way in which a row can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data import forms
from trimtab.data.forms import read_examples
from trimtab.data.rows import Example
from trimtab.errors import DataError
from trimtab.notes import Notes

CONTEXT = "Instruction: What is the sentiment of this news?\nInput: Profit rose .\nAnswer: "
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a good answer"}]

Writer = Callable[..., str]


def one(row: dict[str, Any], write: Writer, root: Path, tokenizer: Any = None, form: str = "auto") -> Example:
    (example,) = read_examples(write(row), tokenizer, root=root, form=form)
    return example


def error_of(*rows: Any, write: Writer, root: Path, tokenizer: Any = None, form: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        read_examples(write(*rows), tokenizer, root=root, form=form)
    return str(caught.value)


def test_finlora(jsonl: Writer, tmp_path: Path) -> None:
    example = one({"context": CONTEXT, "target": "neutral"}, jsonl, tmp_path)
    assert example == Example(
        source="rows.jsonl",
        number=1,
        text=CONTEXT + "neutral",
        trained=((len(CONTEXT) - 1, len(CONTEXT) + 7),),
        prompt=CONTEXT,
        answer="neutral",
        ends=True,
        form="finlora",
    )


@pytest.mark.parametrize(
    ("prompt", "completion", "text", "trained", "before"),
    [
        ("Answer: ", "neutral", "Answer: neutral", " neutral", "Answer: "),
        ("Answer:", " neutral", "Answer: neutral", " neutral", "Answer: "),
        ("Answer: ", " neutral", "Answer: neutral", " neutral", "Answer: "),
        ("Answer:   ", "neutral \n", "Answer: neutral", " neutral", "Answer: "),
        ("Answer:", "neutral", "Answer:neutral", "neutral", "Answer:"),
        ("Answer:\n", "neutral", "Answer:\nneutral", "neutral", "Answer:\n"),
        ("Answer:", "\nneutral", "Answer:\nneutral", "\nneutral", "Answer:\n"),
        ("Q\n\n", "a\n b ", "Q\n\na\n b", "a\n b", "Q\n\n"),
        ("", "neutral", "neutral", "neutral", ""),
    ],
)
@pytest.mark.parametrize("keys", [("prompt", "completion"), ("context", "target")])
def test_boundary(
    jsonl: Writer,
    tmp_path: Path,
    keys: tuple[str, str],
    prompt: str,
    completion: str,
    text: str,
    trained: str,
    before: str,
) -> None:
    example = one(dict(zip(keys, (prompt, completion), strict=True)), jsonl, tmp_path)
    ((start, stop),) = example.trained
    assert example.text == text
    assert example.text[start:stop] == trained
    assert example.prompt == before
    assert example.answer == completion.strip()
    assert example.prompt + example.answer == example.text
    assert example.ends


def test_alpaca_texts(jsonl: Writer, tmp_path: Path) -> None:
    with_input = one({"instruction": "Add {them}.", "input": "1, 2", "output": "3\n"}, jsonl, tmp_path)
    assert with_input.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {them}.\n\n### Input:\n1, 2\n\n"
        "### Response:\n3"
    )
    assert with_input.answer == "3"
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet me.\n\n### Response:\n"
    )
    for row in (
        {"instruction": "Greet me.", "input": "", "output": "Hello", "answer": "extra"},
        {"instruction": "Greet me.", "output": " Hello"},
        {"instruction": "Greet me.", "input": None, "output": "Hello"},
    ):
        example = one(row, jsonl, tmp_path)
        assert (example.prompt, example.text) == (expected, expected + "Hello")
        assert example.trained == ((len(expected), len(expected) + 5),)


def test_chat(jsonl: Writer, tmp_path: Path, tokenizer: Any) -> None:
    example = one({"messages": MESSAGES}, jsonl, tmp_path, tokenizer)
    assert example.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\na good answer<|im_end|>"
    assert example.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert example.answer == "a good answer"
    assert [example.text[a:b] for a, b in example.trained] == ["a good answer<|im_end|>"]
    assert not example.ends


def test_text(jsonl: Writer, tmp_path: Path) -> None:
    example = one({"text": " Once upon a time.\n"}, jsonl, tmp_path)
    assert example == Example("rows.jsonl", 1, " Once upon a time.\n", ((0, 19),), "", None, True, form="text")


ROW_OF = {
    "finlora": {"context": "Q: ", "target": "a"},
    "chat_completion": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "completion": {"prompt": "Q: ", "completion": "a"},
    "alpaca": {"instruction": "Q", "input": "", "output": "a"},
    "multiple_choice": {"question": "Q", "choices": ["a", "b"], "answer": 0},
    "chat": {"messages": MESSAGES},
    "sharegpt": {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "a"}]},
    "dolly": {"instruction": "Q", "response": "a"},
    "question_answer": {"question": "Q", "answer": "a"},
    "labelled_text": {"text": "a", "label": "b"},
    "text": {"text": "a"},
    "source_target": {"source": "Q", "target": "a"},
}


def test_forms_are_recognised_in_order(jsonl: Writer, tmp_path: Path, tokenizer: Any) -> None:
    assert sorted(forms.names(), key=lambda name: forms.find(name).precedence) == list(ROW_OF)
    for form, row in ROW_OF.items():
        assert read_examples(jsonl(row), tokenizer, root=tmp_path)[0].form == form
    # A row with the keys of several forms is of the first of them.
    merged: dict[str, Any] = {}
    for form, row in reversed(ROW_OF.items()):
        merged |= row
        assert read_examples(jsonl(merged), tokenizer, root=tmp_path)[0].form == form


def test_every_form_says_which_keys_it_uses(jsonl: Writer, tmp_path: Path, tokenizer: Any) -> None:
    for name, row in ROW_OF.items():
        form = forms.find(name)
        notes = Notes()
        read_examples(jsonl({**row, "id": 3}), tokenizer, root=tmp_path, notes=notes)
        assert any(note.startswith("keys that are not used: 'id' (1 row)") for note in notes), name
        assert set(row) <= form.known


def test_nulls_of_a_columnar_file_count_as_missing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"context": pa.nulls(1), "target": pa.nulls(1), "text": ["a"]}), tmp_path / "a.parquet")
    assert read_examples("a.parquet", None, root=tmp_path)[0].form == "text"


def test_chat_from_parquet(tmp_path: Path, tokenizer: Any) -> None:
    # Arrow gives every struct every key, so messages come with nulls.
    rows = [{"messages": [{**MESSAGES[0], "name": "x"}, MESSAGES[1]]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_examples("a.parquet", tokenizer, root=tmp_path)[0].answer == "a good answer"


def test_several_files_keep_their_own_numbers(jsonl: Writer, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    first = jsonl({"text": "a"}, {"text": "b"}, name="sub/a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps([{"text": "c"}]))
    examples = read_examples([first, "b.json", first], None, root=tmp_path)
    assert [(row.source, row.number, row.text) for row in examples] == [
        ("sub/a.jsonl", 1, "a"),
        ("sub/a.jsonl", 2, "b"),
        ("b.json", 1, "c"),
        ("sub/a.jsonl", 1, "a"),
        ("sub/a.jsonl", 2, "b"),
    ]


GOOD = {"context": "Q: ", "target": "a"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"query": "Q", "reply": "a"}, ["query, reply", "context/target (finlora)", "text (text)", "data.columns"]),
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, ["preference training", "completion: chosen"]),
        ({"prompt": "Q", "completion": "a", "label": False}, ["preference training (KTO)", "data.form: completion"]),
        ({"context": "Q"}, ["keys: context", "context/target"]),
        ({"context": "Q", "target": None}, ["context, target (null)"]),
        ({"context": "Q", "target": {"a": 3}}, ["'target' must be a string", "dict {'a': 3}", "context, target"]),
        ({"context": ["Q"], "target": "a"}, ["'context' must be a string", "list"]),
        ({"context": "Q", "target": " \n"}, ["the answer 'target' is empty", "context, target"]),
        ({"prompt": "Q", "completion": ""}, ["the answer 'completion' is empty"]),
        ({"instruction": "Q", "output": ""}, ["the answer 'output' is empty"]),
        ({"instruction": "Q", "input": [2], "output": "a"}, ["'input' must be a string"]),
        ({"text": ["a"]}, ["'text' must be a string", "list ['a']"]),
        ({}, ["none at all"]),
        ({"text": "a\ud83d"}, ["half a surrogate pair", "\\ud83d", "character 2"]),
    ],
)
def test_wrong_rows_are_named(jsonl: Writer, tmp_path: Path, row: dict[str, Any], said: list[str]) -> None:
    message = error_of(row, write=jsonl, root=tmp_path)
    assert message.startswith("rows.jsonl, line 1")
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"context": "Q"}, "'target' of the form finlora is missing; keys found: context"),
        ({"context": "Q", "target": None}, "'target' of the form finlora is null"),
        ({"context": "Q", "target": ""}, "the answer 'target' is empty"),
        ({"prompt": "Q", "completion": "a"}, "forms are mixed"),
        ({"text": "a"}, "this row is of the form text (keys: text), but rows.jsonl, line 1 is finlora"),
    ],
)
def test_wrong_later_rows_are_named(jsonl: Writer, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    message = error_of(GOOD, GOOD, row, write=jsonl, root=tmp_path)
    assert message.startswith("rows.jsonl, line 3")
    assert said in message


def test_each_file_has_a_form_of_its_own(jsonl: Writer, tmp_path: Path) -> None:
    names = [jsonl(GOOD, name="a.jsonl"), jsonl({"text": "a"}, name="b.jsonl")]
    assert [example.form for example in read_examples(names, None, root=tmp_path)] == ["finlora", "text"]


def test_a_named_form_is_held_to(jsonl: Writer, tmp_path: Path, tokenizer: Any) -> None:
    message = error_of(GOOD, write=jsonl, root=tmp_path, form="text")
    assert "line 1: key 'text' of the form text is missing; keys found: context, target" in message
    message = error_of({"a": 1}, write=jsonl, root=tmp_path, form="chat", tokenizer=tokenizer)
    assert "key 'messages' of the form chat is missing" in message
    message = error_of({"text": "a"}, write=jsonl, root=tmp_path, form="chat", tokenizer=tokenizer)
    assert "a row of the form text is no conversation" in message


def test_unknown_form_and_no_files(jsonl: Writer, tmp_path: Path) -> None:
    assert "Did you mean 'alpaca'?" in error_of(GOOD, write=jsonl, root=tmp_path, form="alpacca")
    with pytest.raises(DataError, match="empty"):
        read_examples([], None, root=tmp_path)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", ["'messages' must be a list, but is str 'hello'"]),
        ([], ["no message has the role 'assistant'", "none"]),
        ([MESSAGES[0]], ["no message has the role 'assistant'", "(roles: user)"]),
        (["hello"], ["message 1", "must be an object", "str"]),
        ([{"speaker": "human", "value": "x"}], ["message 1", "'role' must be a string, but is missing", "speaker"]),
        ([{"role": "user", "content": None}], ["message 1", "'content' must be a string, but is null"]),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ["message 1", "type 'image_url'; only text"]),
        ([{"role": "user", "content": [{"type": "text"}]}], ["message 1", "each part of 'content' must be"]),
        ([MESSAGES[0], {"role": "assistant", "content": " "}], ["message 2", "content is empty"]),
        ([{"role": "user", "content": "\udc00"}, MESSAGES[1]], ["message 1", "surrogate"]),
    ],
)
def test_wrong_messages_are_named(
    jsonl: Writer, tmp_path: Path, tokenizer: Any, messages: Any, said: list[str]
) -> None:
    message = error_of({"messages": messages}, write=jsonl, root=tmp_path, tokenizer=tokenizer)
    assert message.startswith("rows.jsonl, line 1")
    for part in said:
        assert part in message
