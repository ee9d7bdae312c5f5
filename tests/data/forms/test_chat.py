"""Chat templates of several habits: the assistant's turns are found in each, or it is said that they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trimtab.data.forms import Reading, find
from trimtab.data.forms._messages import read_talk
from trimtab.data.forms._turns import follow as follow_talk
from trimtab.data.rows import Example, Row
from trimtab.data.tokens import encode
from trimtab.errors import DataError
from trimtab.models.causal_head import IGNORED

TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "an answer"},
    {"role": "user", "content": "say an answer again"},
    {"role": "assistant", "content": "an answer"},
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The turn has brackets for the user, a space before the answer, and "</s>" after it; a system message is refused.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
# As Qwen3 does: empty reasoning is put before the last answer only, and the reasoning of past turns is dropped.
REASONING = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt to generate from opens the reasoning; what is rendered of a turn that is there does not.
OPENING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
# No end mark at all: a turn ends where the next begins.
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
UPPER = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']|upper + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Numbers the messages from the end, so that nothing stays where it was when a turn is added.
COUNTDOWN = (
    "{% for m in messages %}{{ loop.revindex ~ ' ' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
)


def follow(messages: list[dict[str, Any]], tokenizer: Any) -> Example:
    row, reading = Row("rows.jsonl", 7, "rows.jsonl, line 7", {}), Reading(tokenizer)
    example = follow_talk(read_talk(row, messages, reading, key="messages"), row, reading)
    assert example is not None
    return example


@pytest.mark.parametrize(
    ("template", "turns", "ends"),
    [
        (CHATML, ["an answer<|im_end|>", "an answer<|im_end|>"], False),
        (BRACKETS, [" an answer<|eos|>", " an answer<|eos|>"], False),
        (REASONING, ["an answer<|im_end|>", "<think>\n\n</think>\n\nan answer<|im_end|>"], False),
        (OPENING, ["an answer<|im_end|>", "an answer<|im_end|>"], False),
        (MARKED, ["an answer<|im_end|>", "an answer<|im_end|>"], False),
        (PLAIN, [" an answer", " an answer"], True),
        (UPPER, ["AN ANSWER<|im_end|>", "AN ANSWER<|im_end|>"], False),
    ],
)
def test_turns_are_found(make_tokenizer: Callable[..., Any], template: str, turns: list[str], ends: bool) -> None:
    tokenizer = make_tokenizer(template=template)
    chat = follow(TALK, tokenizer)
    assert [chat.text[a:b] for a, b in chat.trained] == turns
    assert chat.ends is ends
    assert chat.answer.lower() == "an answer"
    assert chat.text.startswith(chat.prompt + chat.answer)
    assert tokenizer.apply_chat_template(TALK, tokenize=False).rstrip() == chat.text
    # The user's turn says "an answer", too; none of its text may be trained.
    encoded = encode(chat, tokenizer, None)
    trained = [token for token in encoded["labels"] if token != IGNORED]
    assert tokenizer.decode(trained) == "".join(turns) + ("<|eos|>" if ends else "")


@pytest.mark.parametrize("template", [CHATML, REASONING])
def test_messages_after_the_last_answer_are_left_out(make_tokenizer: Callable[..., Any], template: str) -> None:
    tokenizer = make_tokenizer(template=template)
    assert follow([*TALK, {"role": "user", "content": "more"}], tokenizer) == follow(TALK, tokenizer)


def test_content_with_outer_white_space(tokenizer: Any) -> None:
    chat = follow([TALK[0], {"role": "assistant", "content": "\n an answer \n"}], tokenizer)
    assert [chat.text[a:b] for a, b in chat.trained] == ["\n an answer \n<|im_end|>"]
    assert (chat.answer, chat.prompt[-2:]) == ("an answer", "\n ")


def test_a_system_message_and_a_leading_assistant(tokenizer: Any) -> None:
    chat = follow([{"role": "system", "content": "be good"}, TALK[1], *TALK[:2]], tokenizer)
    assert [chat.text[a:b] for a, b in chat.trained] == ["an answer<|im_end|>"] * 2


def test_template_that_refuses(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError) as caught:
        follow([*TALK[:1], {"role": "system", "content": "be good"}, *TALK], make_tokenizer(template=BRACKETS))
    message = str(caught.value)
    assert message.startswith("rows.jsonl, line 7: ")
    assert "only user and assistant roles are supported" in message
    assert "user, system, user, assistant" in message


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (COUNTDOWN, TALK, "message 2"),
        (UPPER.replace("m['content']|upper", "(m['content']|upper if loop.last else m['content'])"), TALK, "message 2"),
    ],
)
def test_template_that_cannot_be_followed(
    make_tokenizer: Callable[..., Any], template: str, messages: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        follow(messages, make_tokenizer(template=template))
    message = str(caught.value)
    assert message.startswith(f"rows.jsonl, line 7, {said}: the chat template cannot be followed")
    assert "prompt/completion" in message


def test_marks_that_mark_nothing(make_tokenizer: Callable[..., Any]) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="marks no text"):
        follow(TALK, make_tokenizer(template=template))


def test_no_template(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl, line 1: .*has no chat template.*prompt/completion"):
        find("chat").check(make_tokenizer(template=None), "rows.jsonl, line 1")


@pytest.mark.full
def test_smollm2_template(smollm2: Any) -> None:
    chat = follow(TALK, smollm2)
    assert chat.text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert [chat.text[a:b] for a, b in chat.trained] == ["an answer<|im_end|>"] * 2
    assert not chat.ends
    encoded = encode(chat, smollm2, None)
    # The tokenizer's own path gives the same ids, but for the line break after the last turn.
    assert encoded["input_ids"] == smollm2.apply_chat_template(TALK, return_dict=True)["input_ids"][:-1]
    trained = [token for token in encoded["labels"] if token != IGNORED]
    assert smollm2.convert_ids_to_tokens(trained) == ["an", "Ġanswer", "<|im_end|>"] * 2
