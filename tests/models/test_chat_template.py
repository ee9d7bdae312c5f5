"""With what a chat template ends a turn of the assistant: the templates of the field, and those that say nothing."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tiny_runs import CHATML, tiny_tokenizer
from trimtab.models.chat_template import TurnEnd, as_of, render, turn_end, unknown_marks

PHI = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{{ '<|eos|>' }}"
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
)
LLAMA_2 = (
    "{% for m in messages %}"
    "{{ '[INST] ' + m.content if m.role == 'user' else ' ' + m.content + ' <|eos|>' }}{% endfor %}"
)
GLM = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"


def tokenizer(template: str | None, *added: str) -> Any:
    made = tiny_tokenizer(template)
    made.add_tokens(list(added))
    return made


@pytest.mark.parametrize(
    ("template", "added", "expected"),
    [
        (CHATML, (), "<|im_end|>"),
        (PHI, ("<|end|>",), "<|end|>"),
        (HARMONY, ("<|end|>", "<|return|>"), "<|return|>"),
        (LLAMA_2, (), "<|eos|>"),
    ],
)
def test_the_token_after_the_last_answer_ends_a_turn(template: str, added: tuple[str, ...], expected: str) -> None:
    known = tokenizer(template, *added)
    assert turn_end(known) == TurnEnd(expected, known.convert_tokens_to_ids(expected))


def test_an_end_that_is_no_token_is_known_by_its_text() -> None:
    assert turn_end(tokenizer(PHI.replace("<|eos|>", ""))) == TurnEnd("<|end|>", None)


@pytest.mark.parametrize(
    "template", [None, GLM, "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% for", "{{ tools[3] }}"]
)
def test_a_template_that_writes_nothing_there_or_fails_has_no_end(template: str | None) -> None:
    assert turn_end(tokenizer(template)) is None


def test_marks_that_the_tokenizer_takes_to_pieces_are_named() -> None:
    assert unknown_marks(tokenizer(PHI)) == ["<|end|>"]
    assert unknown_marks(tokenizer(CHATML)) == []


DATED = (
    "{{ 'Today: ' + strftime_now('%d %b %Y') + strftime_now( \"%Y\" ) }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("template", [DATED, {"default": DATED, "tool_use": "{{ tools[0].name }}"}])
def test_a_template_that_writes_the_date_writes_that_of_the_day_asked_for(template: Any) -> None:
    made, said = tokenizer(template), [{"role": "user", "content": "fog"}]
    with as_of(datetime(2021, 3, 4, tzinfo=UTC)):
        assert render(made, said, tools=None) == "Today: 04 Mar 20212021fog"
        with as_of(datetime(2022, 3, 4, tzinfo=UTC)):
            assert "2022" in render(made, said, tools=None)
        assert "2021" in render(made, said, tools=None)
        if isinstance(template, dict):
            assert render(made, said, tools=[{"name": "tide"}]) == "tide"
    assert "2021" not in render(made, said, tools=None)
