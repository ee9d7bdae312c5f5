"""Chat templates that fail, recurse, loop for ever or fill the memory end in an error of ours that names the row, soon,
and the process goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sampling import sample
from tiny_runs import tiny_tokenizer
from trimtab.data.forms import read_examples
from trimtab.errors import DataError, ModelError, TrimtabError
from trimtab.models import chat_template
from trimtab.reading import MIB

# Time that is over may be told first to a callback of the garbage collector, which drops it; it is told again.
pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

MESSAGES = [{"role": "user", "content": "Which gate?"}, {"role": "assistant", "content": "north"}]
MACRO = "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}"


def repeated(start: str, step: str, steps: int = 60) -> str:
    """A template that goes from a start again and again by a step."""
    return "{% set n = " + start + f" %}}{{% for i in range({steps}) %}}" + "{% set n.x = " + step + " %}{% endfor %}"


FAILING = {
    "divides by zero": "{{ 1 / 0 }}",
    "the rest of zero": "{{ 1 % 0 }}",
    "asks for what is not there": "{{ messages[99].content.upper() }}",
    "calls what cannot be called": "{{ messages() }}",
    "adds a number to a text": "{{ messages[0].content + 1 }}",
    "overflows": "{{ 1e308 * 10 | int }}{{ (1e400) | int }}",
    "many digits": repeated("namespace(x=99999999)", "n.x * n.x", steps=10) + "{{ n.x }}",
    "recurses": MACRO,
    "recurses through a loop": "{% for x in [[[1]]] recursive %}{{ loop([[[1]]]) }}{% endfor %}",
    "nested without end": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "nested blocks": "{% if 1 %}" * 400 + "x" + "{% endif %}" * 400,
    "nested loops": "{% for a in [1] %}" * 60 + "x" + "{% endfor %}" * 60,
    "is cut off": "{% for m in messages %}{{ m.content",
    "no such filter": "{{ messages | nothing }}",
    "no such block": "{% evil %}",
    "reaches for classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaches through format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os.system('id') }}",
    "raises": "{{ raise_exception('\x1b[2Jno') }}",
    "changes the messages": "{{ messages.clear() }}",
}
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "loops that write nothing": "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a * b %}"
    "{% endfor %}{% endfor %}",
    "squares a number": repeated("namespace(x=99999999)", "n.x * n.x"),
    "sorts again and again": "{% for a in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
}
LARGE = {
    "doubles a text": repeated("namespace(x='aaaaaaaa')", "n.x ~ n.x"),
    "doubles by replacing": repeated("namespace(x='a')", "n.x | replace('a', 'aa')"),
    "doubles a list": repeated("namespace(x=[1])", "n.x + n.x"),
    "doubles a block": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set b %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = b %}{% endfor %}",
    "repeats a text": "{{ 'a' * 99999999999 }}",
    "pads": "{{ '%99999999999d' % 1 }}",
    "centres": "{{ 'a' | center(99999999999) }}",
    "formats": "{{ '{:>99999999999}'.format(1) }}",
    "indents": "{{ ('a\n' * 1000) | indent(99999999) }}",
    "fills": "{{ 'a'.ljust(99999999999) }}",
    "batches": "{{ [1] | batch(999999999, 0) | list | length }}",
    "takes a power": "{{ 10 ** 10 ** 9 }}",
    "takes a power of a power": "{{ (9 ** 9 ** 9) % 2 }}",
    "writes a long text": "{% for a in range(99999) %}" + "a" * 1000 + "{% endfor %}",
}


@pytest.fixture(autouse=True)
def _bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "_MEMORY", 300 * MIB)


def refused(template: str, match: str) -> str:
    start = time.monotonic()
    with pytest.raises(ModelError, match=match) as caught:
        chat_template.render(tiny_tokenizer(template), MESSAGES)
    assert time.monotonic() - start < 300  # it ends, however busy the machine is
    assert "\x1b" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", FAILING)
def test_what_fails_is_an_error_of_ours(kind: str) -> None:
    refused(FAILING[kind], "^the chat template cannot render these messages: ")


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_takes_long_is_ended(kind: str) -> None:
    refused(ENDLESS[kind], r"takes more than 0\.3 seconds")


@pytest.mark.parametrize("kind", LARGE)
def test_what_takes_memory_is_ended(kind: str) -> None:
    refused(LARGE[kind], r"MiB of memory|seconds|are not allowed|letters of these messages|OverflowError")
    assert chat_template.render(tiny_tokenizer(), MESSAGES).endswith("north<|im_end|>\n")


def test_powers_in_a_text_are_only_text() -> None:
    assert chat_template.render(tiny_tokenizer("{{ '**' }}**{# ** #}"), MESSAGES) == "****"


def test_templates_by_name_are_looked_at_one_by_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages | length }}", "tool_use": "{{ 9 ** 9 }}"}
    with pytest.raises(ModelError, match="are not allowed"):
        chat_template.render(tokenizer, MESSAGES)


def test_long_messages_make_long_texts() -> None:
    long = [{"role": "user", "content": "a" * 3_000_000}, MESSAGES[1]]
    assert len(chat_template.render(tiny_tokenizer(), long)) > 3_000_000


@pytest.mark.parametrize("template", [FAILING["divides by zero"], MACRO, ENDLESS["loops in loops"]])
def test_the_row_is_named(template: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, '
                                         '{"role": "assistant", "content": "b"}]}\n', "utf-8")  # fmt: skip
    with pytest.raises(DataError, match=r"rows\.jsonl, (row|line) 1: the chat template cannot render these messages"):
        examples(tmp_path / "rows.jsonl", tiny_tokenizer(template))


def examples(path: Path, tokenizer: Any) -> Any:
    return list(read_examples(str(path), tokenizer, root=path.parent))


def test_a_template_s_end_of_a_turn_is_looked_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 0.05)  # each of them is tried with several messages
    for template in sample([*FAILING.values(), *ENDLESS.values()], 7):
        try:
            assert chat_template.turn_end(tiny_tokenizer(template)) is None
        except TrimtabError as error:
            raise AssertionError(f"{template[:60]}: {error}") from error
