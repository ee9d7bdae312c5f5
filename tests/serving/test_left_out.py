"""What a chat template would leave out of a conversation is refused, and not passed over."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_runs import CHATML, tiny_tokenizer
from trimtab.questions import prompt_of
from trimtab.serving.bodies import ChatAsking, FieldError
from trimtab.serving.conversation import Conversations

USER, SYSTEM = {"role": "user", "content": "free ?"}, {"role": "system", "content": "Be brief."}
CALL = {"id": "1", "type": "function", "function": {"name": "berth", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "seven", "tool_call_id": "1"}


def written(template: str, *messages: dict[str, Any]) -> str:
    asked = ChatAsking(model="base", messages=list(messages))
    return Conversations().text(asked, tiny_tokenizer(template))


def without(role: str) -> str:
    return CHATML.replace("for message in messages %}", f"for message in messages if message['role'] != '{role}' %}}")


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (without("system"), [SYSTEM, USER], r"messages\.0: .* leaves messages of the role 'system' out"),
        (without("system"), [USER, SYSTEM, USER], r"messages\.1: .* leaves messages of the role 'system' out"),
        (without("tool"), [USER, RESULT], r"messages\.1: .* leaves messages of the role 'tool' out"),
        (CHATML, [USER, CALLED, RESULT], r"messages\.1: .* leaves calls of tools out"),
    ],
)
def test_what_is_left_out_is_told(template: str, messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(FieldError, match=said):
        written(template, *messages)


@pytest.mark.parametrize("messages", [[SYSTEM, USER], [USER, SYSTEM, USER], [USER, RESULT], [SYSTEM]])
def test_what_is_written_is_taken(messages: list[dict[str, Any]]) -> None:
    text = written(CHATML, *messages)
    assert all(message["content"] in text for message in messages)


def test_a_system_message_that_the_template_has_as_its_own_is_written() -> None:
    own = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    assert written(own + CHATML, SYSTEM, USER) == written(own + CHATML, USER)
    assert prompt_of("chat", USER["content"], tiny_tokenizer(own + CHATML), SYSTEM["content"]).count("Be brief.") == 1
