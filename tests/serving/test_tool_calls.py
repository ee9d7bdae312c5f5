"""Calls of tools in what a model writes, whole and in pieces, and how they are told."""

from __future__ import annotations

import json

import pytest

from served import FakeEngine, running
from tiny_runs import CHATML, tiny_tokenizer
from trimtab.serving.tool_calls import CallFinder, ToolCall

TOOLS = [{"type": "function", "function": {"name": "berth", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "berth", "arguments": {"number": 7}}\n</tool_call>'
FOUND = ToolCall("berth", '{"number": 7}')


def found_in(text: str, size: int) -> list[str | ToolCall]:
    """What is found if ``text`` comes in pieces of ``size`` letters; texts that follow each other are one."""
    finder = CallFinder(TOOLS)
    said: list[str | ToolCall] = []
    for at in range(0, len(text), size):
        said += finder.feed(text[at : at + size])
    said += finder.feed("", last=True)
    joined: list[str | ToolCall] = []
    for one in said:
        if joined and isinstance(one, str) and isinstance(joined[-1], str):
            joined[-1] += one
        else:
            joined.append(one)
    return joined


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain < text", ["plain < text"]),
        (CALL, [FOUND]),
        (f"{CALL}\n{CALL}", [FOUND, FOUND]),
        (f"I ask. {CALL}", ["I ask. ", FOUND]),
        (CALL.removesuffix("</tool_call>"), [FOUND]),
        (CALL.replace("berth", "crane"), [CALL.replace("berth", "crane")]),
        (CALL.replace("7}", "7"), [CALL.replace("7}", "7")]),
        ("<tool_call>", ["<tool_call>"]),
        ('<tool_call>{"name": ["berth"]}</tool_call>', ['<tool_call>{"name": ["berth"]}</tool_call>']),
        ("<tool_cal", ["<tool_cal"]),
        ('<tool_call>{"name": "berth"}</tool_call>', [ToolCall("berth", "{}")]),
        ('<tool_call>{"name": "berth", "arguments": "{\\"a\\": 1}"}</tool_call>', [ToolCall("berth", '{"a": 1}')]),
        (CALL.replace('{"number": 7}', "5"), [CALL.replace('{"number": 7}', "5")]),
    ],
)
def test_calls_are_found_however_the_text_comes(text: str, expected: list[str | ToolCall], size: int) -> None:
    assert found_in(text, size) == expected


WITH_TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML.replace(
    "message['content']", "(message['content'] or message['tool_calls'] | tojson)"
)


def test_a_call_is_told_as_openai_does() -> None:
    engine = FakeEngine(
        words=("I ask. ", "<tool_", 'call>{"name": "berth", ', '"arguments": {"number": 7}}', "</tool_call>")
    )
    engine.use(tiny_tokenizer(WITH_TOOLS))
    with running(engine) as up:
        (choice,) = up.chat(tools=TOOLS).body["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "I ask. "
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "berth", "arguments": '{"number": 7}'}
        assert json.dumps(TOOLS) in engine.decoded(-1)
        chunks = up.chat(tools=TOOLS, stream=True).events
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content", "") for delta in deltas) == "I ask. "
        (streamed,) = [one for delta in deltas for one in delta.get("tool_calls", [])]
        assert (streamed["index"], streamed["function"]) == (0, call["function"])
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        # What was called goes back into the conversation, its arguments as an object for the template.
        turns = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "free"},
        ]
        body = {"model": "legal", "messages": turns, "tools": TOOLS}
        assert up.ask("POST", "/v1/chat/completions", body).status == 200
        assert '"arguments": {"number": 7}' in engine.decoded(-1)
        # Told of no tools, the model calls none.
        assert up.chat(tools=TOOLS, tool_choice="none").body["choices"][0]["finish_reason"] == "stop"
        assert "berth" not in engine.decoded(-1).partition("<|im_start|>")[0]
