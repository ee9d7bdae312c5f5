"""What is put to a model is what its training rows would have put."""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import CHATML, rows, tiny_tokenizer, write_rows
from trimtab.errors import DataError, TrimtabWarning
from trimtab.questions import prompt_of, questions_in


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_prompts_are_those_of_the_rows(tokenizer: Any) -> None:
    assert prompt_of(None, "the fog", tokenizer) == "the fog"
    said = prompt_of("chat", "the fog", tokenizer, "be brief")
    assert said == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthe fog<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(DataError, match=r"--system.*--chat"):
        prompt_of(None, "the fog", tokenizer, "be brief")
    assert prompt_of("alpaca", "the fog", tokenizer, "be brief").startswith("be brief\n\n### Instruction:\nthe fog")
    with pytest.raises(DataError, match=r"no chat template.*model\.chat_template"):
        prompt_of("chat", "the fog", tiny_tokenizer(None), "be brief")


def test_a_row_with_a_system_turn_is_asked_as_it_was_trained(tokenizer: Any, tmp_path: Path) -> None:
    from trimtab.data.forms import read_examples

    turns = [
        {"role": "system", "content": "You are a clerk."},
        {"role": "user", "content": "is berth seven free ?"},
        {"role": "assistant", "content": "no , fog"},
    ]
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    (example,) = read_examples(str(file), tokenizer, root=tmp_path)
    assert prompt_of("chat", "is berth seven free ?", tokenizer, "You are a clerk.") == example.prompt
    (question,) = questions_in(str(file))
    assert question.text == "is berth seven free ?"
    assert question.prompt(None, tokenizer, None) == example.prompt
    assert question.prompt("chat", tokenizer, "another") == example.prompt  # the row's own comes first


def test_system_messages_of_rows_that_the_template_leaves_out_are_told(tmp_path: Path) -> None:
    silent = CHATML.replace("for message in messages %}", "for message in messages if message['role'] != 'system' %}")
    turns = [{"role": "system", "content": "You are a clerk."}, {"role": "user", "content": "is berth seven free ?"}]
    (question,) = questions_in(str(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])))
    with pytest.warns(TrimtabWarning, match="leaves the system messages of the rows out"):
        question.prompt("chat", tiny_tokenizer(silent), None)


def test_what_the_template_leaves_out_of_messages_is_told_and_tools_are_put(tmp_path: Path) -> None:
    template = CHATML + "{% if tools %}{{ tools[0].function.name }}{% endif %}"
    turns = [{"role": "user", "content": "is berth seven free ?", "name": "ada"}]
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    (question,) = questions_in(str(write_rows(tmp_path / "rows.jsonl", [{"messages": turns, "tools": tools}])))
    with pytest.warns(TrimtabWarning, match="leaves 'name' of messages of the role 'user' of the rows out"):
        assert question.prompt("chat", tiny_tokenizer(template), None).endswith("look_up")


def test_a_key_that_the_template_does_not_do_without_is_not_tried(tmp_path: Path) -> None:
    strict = "{% if not messages[0].name %}{{ raise_exception('who asks?') }}{% endif %}" + CHATML
    turns = [{"role": "user", "content": "is berth seven free ?", "name": "ada"}]
    (question,) = questions_in(str(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "is berth seven free ?" in question.prompt("chat", tiny_tokenizer(strict), None)


def test_questions_of_a_text_and_of_rows(tmp_path: Path) -> None:
    text = tmp_path / "questions.txt"
    text.write_text("\ufeffis it calm?\n\n  fog שלום\r\n", encoding="utf-8")
    assert [question.text.strip() for question in questions_in(str(text))] == ["is it calm?", "fog שלום"]
    for form in ("completion", "alpaca", "chat", "multiple_choice", "finlora"):
        found = questions_in(str(write_rows(tmp_path / f"{form}.jsonl", rows(3, form))))
        assert len(found) == 3
    asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": "the fog"}, {"instruction": "say", "input": "tug"}])
    assert [question.text for question in questions_in(str(asked))] == ["the fog", "say\n\ntug"]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "What is it?", "input": "fog", "output": "calm"},
        {"instruction": "What is it?", "input": "fog", "output": "calm", "system": "Be brief."},
        {"prompt": "Message: fog\nAnswer: ", "completion": "calm"},
        {"question": "fog?", "choices": ["calm", "storm"], "answer": "calm"},
    ],
    ids=["alpaca", "system", "completion", "choices"],
)
def test_a_row_is_asked_as_it_was_trained_with_or_without_its_answer(
    row: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    from trimtab.data.forms import read_examples

    file = write_rows(tmp_path / "rows.jsonl", [row])
    (example,) = read_examples(str(file), tokenizer, root=tmp_path)
    bare = {key: value for key, value in row.items() if key not in ("output", "completion")}
    for said in (row, bare):
        (question,) = questions_in(str(write_rows(tmp_path / "asked.jsonl", [said])))
        assert question.prompt(example.form, tokenizer, None) == example.prompt


def test_questions_that_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2.*asks nothing.*keys found: answer"):
        questions_in(str(write_rows(tmp_path / "rows.jsonl", [{"prompt": "fog"}, {"answer": "no"}])))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no question"):
        questions_in(str(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match="cannot be read"):
        questions_in(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        questions_in(str(tmp_path / "latin.txt"))
    with pytest.raises(DataError, match="UTF-8"):
        prompt_of(None, "n\udce9", None)


def test_rows_of_a_compressed_file_are_rows(tmp_path: Path) -> None:
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(write_rows(tmp_path / "rows.jsonl", rows(3)).read_bytes()))
    assert [one.text for one in questions_in(str(packed))] == [row["prompt"] for row in rows(3)]
