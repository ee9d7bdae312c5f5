"""Calls of tools and thoughts, in templates after the manner of three families, written anew and short.

What is expected is written out by hand, or is the template's own rendering of the messages up to a turn.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sampling
from trimtab.data import forms
from trimtab.data.forms import read_examples
from trimtab.data.preview import preview
from trimtab.data.rows import Example, Row
from trimtab.data.tokens import encode_all
from trimtab.errors import DataError
from trimtab.notes import Notes

Writer = Callable[..., str]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's habits: schemas in a system turn; thoughts only after the last question, and an empty one in the last turn;
# calls as JSON in tags; what tools answer stands in a user turn; a switch for thinking.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if tools %}{{ '<|im_start|>system\n' + first + '\n# Tools\n' }}{% for t in tools %}"
    "{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% elif first %}{{ '<|im_start|>system\n' + first + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ content }}{% for c in m.tool_calls %}{% set f = c.function if c.function else c %}"
    "{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}"
    "{{ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'user' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Llama 3's habits: headers, schemas in the first question, one call a turn, its arguments as an object.
HEADERS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
    "{{ '<|im_start|>system<|sep|>\n\n' + said + '<|im_end|>' }}"
    "{% if tools %}{{ '<|im_start|>user<|sep|>\n\nFunctions:\n' }}{% for t in tools %}"
    "{{ t | tojson(indent=2) + '\n' }}{% endfor %}"
    "{{ messages[0].content | trim + '<|im_end|>' }}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call a turn') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}"
    '{{ \'<|im_start|>assistant<|sep|>\n\n{"name": "\' + f.name + \'", "parameters": \' }}'
    "{{ f.arguments | tojson }}{{ '}<|im_end|>' }}"
    "{% elif m.role in ('tool', 'ipython') %}"
    "{{ '<|im_start|>ipython<|sep|>\n\n' + (m.content | tojson) + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '<|sep|>\n\n' + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|sep|>\n\n' }}{% endif %}"
)
# Arguments are joined to the text as they are, and a call is known by its missing content.
JOINED = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is not defined %}"
    "{% set f = m.tool_calls[0].function %}"
    "{{ '<|im_start|>assistant\n' + f.name + '(' + f.arguments + ')<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML

SCHEMA = {"type": "object", "properties": {"port": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "tide_at", "description": "?", "parameters": SCHEMA}}
CALL = {"id": "c1", "type": "function", "function": {"name": "tide_at", "arguments": {"port": "Brest", "hour": 7}}}
QUESTION, TOLD = {"role": "user", "content": "How high is the tide?"}, {"role": "tool", "content": "2.5 m"}
ANSWER = {"role": "assistant", "content": "It is 2.5 m."}


def calling(call: dict[str, Any] = CALL, **content: Any) -> list[dict[str, Any]]:
    return [QUESTION, {"role": "assistant", **content, "tool_calls": [call]}, TOLD, ANSWER]


@pytest.fixture
def read(jsonl: Writer, tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Callable[..., tuple[Example, list[str]]]:
    """The one example of a row in a template, and what was told."""

    def read(row: dict[str, Any], template: str = CHATML, **options: Any) -> tuple[Example, list[str]]:
        notes = Notes()
        (example,) = read_examples(jsonl(row), make_tokenizer(template=template), root=tmp_path, notes=notes, **options)
        return example, list(notes)

    return read


def parts(example: Example) -> list[str]:
    return [example.text[start:stop] for start, stop in example.trained]


JSON_ARGUMENTS = '{"port": "Brest", "hour": 7}'


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize(
    ("template", "call", "schema"),
    [
        (THINKING, f'<tool_call>\n{{"name": "tide_at", "arguments": {JSON_ARGUMENTS}}}\n</tool_call><|im_end|>', True),
        (HEADERS, f'{{"name": "tide_at", "parameters": {JSON_ARGUMENTS}}}<|im_end|>', True),
        (JOINED, f"tide_at({JSON_ARGUMENTS})<|im_end|>", False),
    ],
)
@pytest.mark.parametrize("arguments", [{"port": "Brest", "hour": 7}, JSON_ARGUMENTS])
def test_a_call_alone_is_trained(
    read: Callable[..., Any], template: str, call: str, schema: bool, arguments: Any, content: dict[str, Any]
) -> None:
    made = {**CALL, "function": {"name": "tide_at", "arguments": arguments}}
    example, notes = read({"messages": calling(made, **content), "tools": [TOOL]}, template)
    first, last = parts(example)
    # An empty thought stands in the turns after the last question, the call among them.
    assert first.removeprefix("<think>\n\n</think>\n\n") == call
    assert last.removeprefix("<think>\n\n</think>\n\n") == "It is 2.5 m.<|im_end|>"
    assert ('"description": "?"' in example.text) is schema
    assert "2.5 m" in example.text[: example.trained[-1][0]]
    assert notes == ([] if schema else [next(iter(notes))])
    if not schema:
        assert "keys that the chat template does not show: 'tools' (1 row)" in notes[0]


@pytest.mark.parametrize("template", [THINKING, HEADERS])
def test_functions_are_tools_in_another_spelling(read: Callable[..., Any], template: str) -> None:
    made = {"role": "assistant", "content": None, "function_call": {"name": "tide_at", "arguments": JSON_ARGUMENTS}}
    messages = [QUESTION, made, *calling()[2:]]
    row = {"messages": messages, "functions": [TOOL["function"]]}
    assert read(row, template) == read({"messages": messages, "tools": [TOOL]}, template)
    with pytest.raises(DataError, match="'tools' and 'functions' are two lists of the same"):
        read({"messages": messages, "functions": [TOOL["function"]], "tools": [TOOL]}, template)
    with pytest.raises(DataError, match="'functions' must be a list of objects"):
        read({"messages": messages, "functions": ["tide_at"]}, template)


def test_messages_of_a_table_are_read_from_json_text(
    read: Callable[..., Any], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    expected, _ = read({"messages": [QUESTION, ANSWER]})
    text = json.dumps([QUESTION, ANSWER]).replace('"', '""')
    (tmp_path / "talks.csv").write_text(f'messages\n"{text}"\n')
    (example,) = read_examples("talks.csv", make_tokenizer(), root=tmp_path)
    assert example.text == expected.text
    with pytest.raises(DataError, match=r"line 1: 'messages' must be a list, but is str '\[{not JSON'"):
        read({"messages": "[{not JSON"})


def test_an_end_in_the_middle_is_told(read: Callable[..., Any]) -> None:
    said = "the end token <|im_end|> in the middle, which is read as an end: 1 row in rows.jsonl, line 1"
    for question, answer in (("No<|im_end|> wind?", "None."), ("Wind?", "No<|im_end|>ne.<|im_end|>")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert any(said in note for note in read({"messages": messages})[1])
    assert any(said in note for note in read({"prompt": "Wind?", "completion": "No<|im_end|>ne."})[1])
    plain = [{"role": "user", "content": "Wind?"}, {"role": "assistant", "content": "None.<|im_end|>"}]
    assert not any("in the middle" in note for note in read({"messages": plain})[1])


def test_a_content_of_null_is_called_null(read: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="'content' must be a string, but is null; keys found: role, content, refusal"):
        read({"messages": [QUESTION, {"role": "assistant", "content": None, "refusal": "I will not."}]})


def test_the_last_turn_may_be_a_call(read: Callable[..., Any]) -> None:
    example, _ = read({"messages": calling()[:2], "tools": json.dumps([TOOL])}, HEADERS)
    assert example.answer == f'{{"name": "tide_at", "parameters": {JSON_ARGUMENTS}}}'
    assert example.prompt + example.answer + "<|im_end|>" == example.text
    assert example.prompt.endswith("<|im_start|>assistant<|sep|>\n\n")
    assert not example.ends


def test_columnar_files_give_calls_the_keys_that_they_had(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    other = {"function": {"name": "buoys", "arguments": {"near": None, "count": [1, None]}}}
    rows = [{"messages": calling(), "tools": [TOOL]}, {"messages": calling(other)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_examples("a.parquet", make_tokenizer(template=THINKING), root=tmp_path)
    assert f'"arguments": {JSON_ARGUMENTS}}}' in first.text
    assert '{"name": "buoys", "arguments": {"count": [1, null]}}' in second.text
    assert "# Tools" not in second.text
    assert "null" not in first.text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": calling()}, "does not write the call of 'tide_at'"),
        ({"messages": calling("tide_at")}, "message 2: 'tool_calls' must be a list of objects"),
        ({"messages": [QUESTION, ANSWER], "tools": "tide_at"}, "'tools' must be a list, but is 'tide_at'"),
        ({"messages": [QUESTION, ANSWER], "tools": ["tide_at"]}, "'tools' must be a list of objects"),
        ({"messages": [QUESTION, ANSWER], "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
    ],
)
def test_calls_that_would_be_lost_are_errors(read: Callable[..., Any], row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(row)
    assert "rows.jsonl, line 1" in str(caught.value)


def test_a_name_among_the_tools_is_no_call(read: Callable[..., Any]) -> None:
    listing = "{% if tools %}{{ tools | tojson }}{% endif %}"
    with pytest.raises(DataError, match="does not write the call of 'tide_at'"):
        read({"messages": calling(content=None), "tools": [TOOL]}, listing + CHATML)
    first = THINKING.replace("{% for c in m.tool_calls %}", "{% for c in (m.tool_calls or [])[:1] %}")
    twice = [QUESTION, {"role": "assistant", "tool_calls": [CALL, CALL]}, TOLD, ANSWER]
    with pytest.raises(DataError, match="does not write the call of 'tide_at'"):
        read({"messages": twice, "tools": [TOOL]}, first)
    example, _ = read({"messages": twice, "tools": [TOOL]}, THINKING)
    assert parts(example)[0].count("<tool_call>") == 2


def test_other_spellings_of_a_call(read: Callable[..., Any]) -> None:
    inner = CALL["function"]
    told = {"role": "observation", "content": "2.5 m"}
    for message in (
        {"role": "assistant", "content": None, "function_call": inner},
        {"from": "function_call", "value": json.dumps(inner)},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [inner]},
    ):
        example, _ = read({"messages": [QUESTION, message, told, ANSWER]}, THINKING)
        assert example.text == read({"messages": calling()}, THINKING)[0].text


THOUGHT = "<think>\nlow at six\n</think>\n\n"


@pytest.mark.parametrize("spelled", ["content", "reasoning_content"])
def test_thoughts_that_the_template_drops_make_a_turn_context(read: Callable[..., Any], spelled: str) -> None:
    def turn(answer: str) -> dict[str, Any]:
        if spelled == "content":
            return {"role": "assistant", "content": THOUGHT + answer}
        return {"role": "assistant", "content": answer, spelled: "low at six"}

    example, notes = read({"messages": [QUESTION, turn("one"), QUESTION, turn("two")]}, THINKING)
    assert parts(example) == [f"{THOUGHT}two<|im_end|>"]
    assert "<|im_start|>assistant\none<|im_end|>" in example.text
    # What has to be written is the thought, too; so it is no part of the prompt.
    assert example.prompt.endswith("<|im_start|>assistant\n")
    assert example.answer == f"{THOUGHT}two"
    (note,) = notes
    assert note.startswith("earlier answers that are context only, since the chat template drops the thoughts")
    assert "1 row in rows.jsonl, line 1" in note


def test_a_template_that_keeps_thoughts_trains_all_turns(read: Callable[..., Any]) -> None:
    turn = {"role": "assistant", "content": f"{THOUGHT}one"}
    example, notes = read({"messages": [QUESTION, turn, QUESTION, turn]})
    assert parts(example) == [f"{THOUGHT}one<|im_end|>"] * 2
    assert notes == []


def test_thoughts_that_the_template_does_not_know_are_told(read: Callable[..., Any]) -> None:
    turn = {"role": "assistant", "content": "one", "reasoning_content": "low at six"}
    example, notes = read({"messages": [QUESTION, turn, QUESTION, turn]})
    assert parts(example) == ["one<|im_end|>"] * 2
    assert notes == [
        "keys that the chat template does not show: 'reasoning_content' of messages of the role 'assistant' (1 "
        "row); the first row is rows.jsonl, line 1"
    ]


def test_a_key_is_told_with_the_roles_that_the_template_leaves_it_out_of(read: Callable[..., Any]) -> None:
    named = CHATML.replace("m['content']", "(m.name or '') + m['content']")
    only_tools = named.replace("m.name or ''", "(m.name or '') if m.role == 'tool' else ''")
    said = [{**QUESTION, "name": "ada"}, {"role": "tool", "name": "depth", "content": "2.5"}, ANSWER]
    assert read({"messages": said}, named)[1] == []
    example, notes = read({"messages": said}, only_tools)
    assert "depth2.5" in example.text
    (note,) = notes
    assert note.startswith(
        "keys that the chat template does not show: 'name' of messages of the role 'user' (1 row); the first row is"
    )


def test_messages_after_the_last_trained_turn_are_told(read: Callable[..., Any]) -> None:
    example, notes = read({"messages": [QUESTION, ANSWER, QUESTION]})
    assert example.text.count(QUESTION["content"]) == 1
    assert notes == [
        "rows whose messages after the last turn that is trained are left out: 1 row in rows.jsonl, line 1"
    ]


def test_the_rows_own_switches_reach_the_template(read: Callable[..., Any]) -> None:
    row = {"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"greeting": "ahoy"}}
    example, notes = read(row, CHATML + "{% if greeting %}{{ greeting }}{% endif %}")
    assert notes == []
    example, notes = read(row)
    assert "'chat_template_kwargs' (1 row)" in notes[0]
    assert parts(example) == ["It is 2.5 m.<|im_end|>"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}, {"weight": "0"}])
def test_a_turn_can_be_context_only(read: Callable[..., Any], mark: dict[str, Any]) -> None:
    wrong = {"role": "assistant", "content": "I do not know.", **mark}
    right = {**ANSWER, **dict.fromkeys(mark, 1)}
    for template in (CHATML, THINKING, HEADERS):
        example, notes = read({"messages": [QUESTION, wrong, QUESTION, right]}, template)
        assert [part.removeprefix("<think>\n\n</think>\n\n") for part in parts(example)] == ["It is 2.5 m.<|im_end|>"]
        assert "I do not know." in example.text
        assert notes == []
    # What follows the last trained turn is left out.
    example, _ = read({"messages": [QUESTION, right, QUESTION, wrong]})
    assert example.text.endswith("It is 2.5 m.<|im_end|>")


def test_marks_of_a_template_obey_weights(read: Callable[..., Any]) -> None:
    marked = CHATML.replace(
        "m['content'] + '<|im_end|>\n' }}",
        "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    row = {"messages": [QUESTION, {**ANSWER, "weight": 0}, QUESTION, ANSWER]}
    assert read(row, marked)[0] == read(row)[0]


def test_rows_of_weight_nought_are_left_out(jsonl: Writer, tmp_path: Path, tokenizer: Any) -> None:
    rows = jsonl({"messages": [QUESTION, ANSWER], "weight": 0}, {"messages": [QUESTION, ANSWER], "weight": 1.0})
    notes = Notes()
    (example,) = read_examples(rows, tokenizer, root=tmp_path, notes=notes)
    assert example.number == 2
    assert list(notes) == ["rows left out, since their weight is 0: 1 row in rows.jsonl, line 1"]
    untrained = {"messages": [QUESTION, {**ANSWER, "train": False}]}
    with pytest.raises(DataError, match=r"No row is left to train on\. rows left out, since none of their turns"):
        read_examples(jsonl(untrained), tokenizer, root=tmp_path)
    for value in (0.5, "heavy", [1]):
        with pytest.raises(DataError, match="line 1: 'weight' must be 0 "):
            read_examples(jsonl({"text": "a", "weight": value}), tokenizer, root=tmp_path)


def test_a_system_text_where_the_template_takes_none(read: Callable[..., Any]) -> None:
    system = {"role": "system", "content": "Be brief."}
    for row in ({"messages": [system, QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER], "system": "Be brief."}):
        example, notes = read(row, NO_SYSTEM)
        assert example.text.startswith("<|im_start|>user\nBe brief.\n\nHow high is the tide?<|im_end|>")
        assert notes[0].startswith("system texts put at the beginning of the first user message")
        example, notes = read(row)
        assert example.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow")
        assert notes == []
    with pytest.raises(DataError, match="'system' and the first of 'messages'"):
        read({"messages": [system, QUESTION, ANSWER], "system": "Be long."})


def test_messages_that_a_template_drops_are_told_or_refused(read: Callable[..., Any]) -> None:
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}")
    system = {"role": "system", "content": "Be brief."}
    _, notes = read({"messages": [system, QUESTION, ANSWER]}, silent)
    assert notes == ["messages of the role 'system' that the chat template leaves out: 1 row in rows.jsonl, line 1"]
    with pytest.raises(DataError, match="message 1: the chat template leaves out what the role 'critic' says"):
        read({"messages": [{**system, "role": "critic"}, QUESTION, ANSWER]}, silent)
    assert "critic\nBe brief." in read({"messages": [{**system, "role": "critic"}, QUESTION, ANSWER]})[0].text


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "Human", "content": "How high is the tide?"}, {"role": "model", "content": "It is 2.5 m."}],
        [{"from": "human", "value": "How high is the tide?"}, {"from": "gpt", "value": "It is 2.5 m."}],
        [
            {"role": "user", "content": ["How high is ", {"type": "text", "text": "the tide?"}]},
            {"role": "bot", "content": [{"type": "output_text", "text": "It is 2.5 m."}]},
        ],
    ],
)
def test_other_spellings_of_messages(read: Callable[..., Any], messages: list[dict[str, Any]]) -> None:
    expected, _ = read({"messages": [QUESTION, ANSWER]})
    for key in ("messages", "conversations"):
        example, notes = read({key: messages})
        assert (example.text, example.trained, example.answer) == (expected.text, expected.trained, "It is 2.5 m.")
        assert notes == []


def test_the_names_of_roles_that_a_template_knows_stay(read: Callable[..., Any]) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, QUESTION, ANSWER]
    assert "<|im_start|>system\nBe brief." in read({"messages": messages})[0].text
    knows = "{# 'developer' #}" + CHATML
    assert "<|im_start|>developer\nBe brief." in read({"messages": messages}, knows)[0].text


def test_prompt_and_completion_as_messages(read: Callable[..., Any]) -> None:
    earlier = [QUESTION, {"role": "assistant", "content": "When?"}, {"role": "user", "content": "Now."}]
    whole, _ = read({"messages": [*earlier, ANSWER]})
    example, _ = read({"prompt": earlier, "completion": [ANSWER]})
    assert example.text == whole.text
    assert parts(example) == ["It is 2.5 m.<|im_end|>"]
    assert read({"prompt": earlier, "completion": "It is 2.5 m."})[0] == example
    assert read({"prompt": earlier, "completion": [*earlier, ANSWER]})[0] == example
    alone, _ = read({"prompt": "How high is the tide?", "completion": [ANSWER]})
    assert alone.text == read({"messages": [QUESTION, ANSWER]})[0].text


def test_pairs_go_into_the_chat_template_if_it_is_named(read: Callable[..., Any]) -> None:
    expected = "<|im_start|>user\nHow high?<|im_end|>\n<|im_start|>assistant\n2.5 m<|im_end|>"
    for row in (
        {"prompt": "How high?", "completion": "2.5 m"},
        {"instruction": "How high?", "input": "", "output": "2.5 m"},
        {"instruction": "How high?", "response": "2.5 m"},
        {"question": "How high?", "answer": "2.5 m"},
        {"context": "How high?", "target": "2.5 m"},
    ):
        example, notes = read(row, form="chat")
        assert (example.text, example.form, notes) == (expected, "chat", [])
    row = {"instruction": "And now?", "output": "3 m", "system": "Be brief.", "history": [["How high?", "2.5 m"]]}
    example, notes = read({**row, "tools": [TOOL]}, THINKING, form="chat")
    assert "Be brief.\n# Tools" in example.text
    assert parts(example) == ["2.5 m<|im_end|>", "<think>\n\n</think>\n\n3 m<|im_end|>"]
    assert notes == []


@pytest.mark.parametrize("template", [CHATML, THINKING, HEADERS])
def test_marked_words_in_what_is_said_do_not_mislead(read: Callable[..., Any], template: str) -> None:
    sly = {"role": "user", "content": "say <|im_start|>assistant\nand <|im_start|>assistant<|sep|>\n\nand <|im_end|>"}
    example, _ = read({"messages": [sly, ANSWER, sly, {"role": "assistant", "content": "a <|im_end|> b"}]}, template)
    assert [part.removeprefix("<think>\n\n</think>\n\n") for part in parts(example)] == [
        "It is 2.5 m.<|im_end|>",
        "a <|im_end|> b<|im_end|>",
    ]


def test_the_preview_marks_what_is_trained(read: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(template=THINKING)
    example, _ = read({"messages": calling(), "tools": [TOOL]}, THINKING)
    shown = str(preview(encode_all([example], tokenizer, None), tokenizer))
    marked = [part.split("]]")[0] for part in shown.split("[[")[1:]]
    assert marked == parts(example)


def test_turns_are_those_that_the_templates_of_the_field_mark(make_tokenizer: Callable[..., Any]) -> None:
    """TRL brings the templates of many families, and the same with the assistant's text marked: a reference that was
    written by others. Where both render one text, the turns that are searched for are those that are marked."""
    trl = importlib.util.find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("needs TRL for its templates")
    folder = Path(trl.origin).parent / "chat_templates"
    again = {"role": "assistant", "content": "Yes."}
    tokenizer = make_tokenizer()
    texts = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.jinja"))
    marks = set(re.findall(r"<\|?[A-Za-z_]+\|?>|<｜[^｜]+｜>", texts)) - {"<think>", "<tool_call>", "<tools>"}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *sorted(marks)]})
    compared = []
    for marked in sampling.sample(sorted(folder.glob("*_training.jinja")), 4):
        both = [folder / marked.name.replace("_training", ""), marked]
        if not both[0].is_file():
            continue
        found = []
        for path in both:
            template = path.read_text(encoding="utf-8")
            tokenizer = make_tokenizer(template=template)
            marks = set(re.findall(r"<\|?[A-Za-z_]+\|?>|<｜[^｜]+｜>", template)) - {
                "<think>",
                "<tool_call>",
                "<tools>",
            }
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *sorted(marks)]})
            row = Row("rows.jsonl", 1, "rows.jsonl, line 1", {"messages": [QUESTION, ANSWER, QUESTION, again]})
            found.append(forms.find("chat").example(row, forms.Reading(tokenizer)))
        searched, reference = found
        assert searched is not None
        assert reference is not None
        # Some mark the header, too, or what the prompt already has; the ends are the same.
        if searched.text == reference.text:
            compared.append(marked.name)
            for one, other in zip(searched.trained, reference.trained, strict=True):
                assert one[1] == other[1], marked.name
                assert other[0] <= one[0], marked.name
    assert len(compared) >= 4, compared
