"""A model's chat template: where it comes from, how it is rendered, and with what it ends a turn of the assistant.

A base model often ends its texts with one token (``<|endoftext|>``) and its chat template a turn with another
(``<|im_end|>``). What is trained on conversations learns to write the second, so generation has to stop there, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, ModelError, did_you_mean
from trimtab.reading import MIB, BoundsError, within

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED = {"chatml": CHATML}
"""Templates that a configuration may name; all others are files or texts."""

LARGEST = 2**20
"""Bytes of a template's file; those of the field have a few thousand."""

_SECONDS, _MEMORY = 20.0, 1024 * MIB
_LETTERS, _PER_LETTER = MIB, 20
"""Most letters of a rendered text: so many, and so many more for each letter of the messages."""

_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"\\]*)(?P=quote)\s*\)""")
_DAY: ContextVar[datetime | None] = ContextVar("_DAY", default=None)

_ANSWER = "Zyx"  # a word that no template changes or writes itself


@dataclass(frozen=True)
class TurnEnd:
    """With what a template ends an assistant's turn.

    Attributes:
        text: such as ``<|im_end|>``.
        token: its id; None where the tokenizer has no such token and writes it in pieces.
    """

    text: str
    token: int | None


def turn_end(tokenizer: Any) -> TurnEnd | None:
    """What the chat template of ``tokenizer`` writes after the last turn of the assistant; None where it writes
    nothing, where there is no template, or where it cannot be rendered."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(render(tokenizer, messages))
    except ModelError:  # whoever renders a row with it says so
        return None
    _, found, rest = text.rpartition(_ANSWER)
    rest = rest.strip()
    if not found or not rest:
        return None
    # What stands between two turns may follow the end: Phi-3 writes "<|end|>" and then "<|endoftext|>".
    marks = {str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.added_tokens_decoder.values())}
    if starts := [mark for mark in marks if mark and rest.startswith(mark)]:
        mark = max(starts, key=len)
        return TurnEnd(mark, int(tokenizer.convert_tokens_to_ids(mark)))
    return TurnEnd(rest, None)


def spelled_end(tokenizer: Any) -> str:
    """The text with which the chat template ends a turn, where that is no token of ``tokenizer``; empty for none."""
    turn = turn_end(tokenizer)
    return turn.text if turn is not None and turn.token is None else ""


def is_in(content: str, text: str) -> bool:
    """Whether ``text``, which a template wrote, has a message of that ``content``. Templates strip what they are given,
    and may have a system message of their own that says the same."""
    return content.strip() in text


def template_text(said: str, root: Path) -> str:
    """The Jinja text that a configuration means by ``said``: itself, one of ``NAMED``, or what the file of that path
    (from ``root``) holds. Raises ConfigError if there is no such file, or if it holds no template."""
    if not said.strip() or _is_jinja(said):
        return said
    path = root / Path(said).expanduser()
    if not path.is_file():
        if said in NAMED:
            return NAMED[said]
        near = [*NAMED, *(other.name for other in path.parent.glob("*.jinja*"))]
        raise ConfigError(
            f"model.chat_template: {said} is neither Jinja text nor one of {', '.join(NAMED)}, and there is no file "
            f"{path}.{did_you_mean(path.name, near)}"
        )
    if path.stat().st_size > LARGEST:
        raise ConfigError(f"model.chat_template: {path} has more than {LARGEST:,} bytes; that is no chat template")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"model.chat_template: {path}: expected text in UTF-8 ({error})") from None
    if not _is_jinja(text):
        raise ConfigError(f"model.chat_template: {path} holds no Jinja template: expected {{{{ ... }}}} or {{% ... %}}")
    return text


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


def checked_template(template: str, tokenizer: Any) -> str:
    """``template``, if it is Jinja. It runs in transformers' sandbox only. Raises ConfigError, which names the line."""
    from jinja2 import TemplateSyntaxError

    try:
        render(tokenizer, [{"role": "user", "content": "a"}], chat_template=template)
    except ModelError as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            said = error.__cause__
            raise ConfigError(f"model.chat_template, line {said.lineno}: {said.message}") from None
        return template  # it may refuse this conversation; rows are what it has to take
    return template


def unknown_marks(tokenizer: Any) -> list[str]:
    """Marks such as ``<|im_start|>`` that the template writes and the tokenizer takes to pieces."""
    if not isinstance(tokenizer.chat_template, str):
        return []
    marks = dict.fromkeys(re.findall(r"<\|[A-Za-z_]+\|>", tokenizer.chat_template))
    return [mark for mark in marks if len(tokenizer(mark, add_special_tokens=False).input_ids) > 1]


@contextmanager
def as_of(day: datetime) -> Iterator[None]:
    """While open, templates that write today's date (Llama 3's, gpt-oss's) write that of ``day``: the rows of a run are
    then the same ones on every day on which it is gone on with."""
    before = _DAY.set(day)
    try:
        yield
    finally:
        _DAY.reset(before)


def _dated(tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with the template of ``as_of``'s day in place of one that asks for the date."""
    day = _DAY.get()
    templates = options.get("chat_template") or getattr(tokenizer, "chat_template", None)
    if day is None or not any(_NOW.search(text) for text in _texts(templates)):
        return options
    text = tokenizer.get_chat_template(options.get("chat_template"), tools=options.get("tools"))
    return {**options, "chat_template": _NOW.sub(lambda said: json.dumps(day.strftime(said["format"])), text)}


def render(
    tokenizer: Any, messages: Sequence[Any], *, tokenize: bool = False, limit_memory: bool = True, **options: Any
) -> Any:
    """What ``tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)`` gives.

    A template is a program that came with a model. transformers runs it in jinja's sandbox; here it has an end as well:
    so many seconds, so much memory, so long a text. Raises ModelError if it goes beyond, or fails in any other way.

    ``limit_memory``: off where other threads of the process allocate meanwhile, which the limit would hit as well.
    """
    try:
        for template in _texts(options.get("chat_template") or getattr(tokenizer, "chat_template", None)):
            _check_powers(template)
        # The tokenizer's own memory is not bounded: it ends the process where there is none.
        with within("it", seconds=_SECONDS, memory=_MEMORY if limit_memory and not tokenize else None):
            out = tokenizer.apply_chat_template(messages, tokenize=tokenize, **_dated(tokenizer, options))
            if isinstance(out, str):
                most = _LETTERS + _PER_LETTER * sum(len(str(message)) for message in messages)
                if len(out) > most:
                    raise BoundsError(f"it makes a text of {len(out):,} letters of these messages")
    except Exception as error:  # whatever a program may raise
        said = " ".join(str(error).split())[:400]
        kind = "" if type(error).__name__ in ("TemplateError", "BoundsError") else f"{type(error).__name__}: "
        raise ModelError(f"the chat template cannot render these messages: {kind}{said}") from error
    return out


def _texts(templates: Any) -> list[str]:
    """One template, or several by name."""
    if isinstance(templates, dict):
        templates = list(templates.values())
    return [one for one in (templates if isinstance(templates, list) else [templates]) if isinstance(one, str)]


@lru_cache
def _check_powers(template: str) -> None:
    """Raise BoundsError if ``template`` takes powers: one of large numbers cannot be interrupted."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = list(Environment().lex(template))
    except TemplateSyntaxError:
        return  # its rendering says where
    if any(kind == "operator" and value == "**" for _, kind, value in tokens):
        raise BoundsError("it takes powers (**), which are not allowed in chat templates")
