"""A model's chat template: where it comes from, and with what it ends a turn of the assistant.

A base model often ends its texts with one token (``<|endoftext|>``) and its chat template a turn with another
(``<|im_end|>``). What is trained on conversations learns to write the second, so generation has to stop there, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, did_you_mean

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED = {"chatml": CHATML}
"""Templates that a configuration may name; all others are files or texts."""

LARGEST = 2**20
"""Bytes of a template's file; those of the field have a few thousand."""

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
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template can fail in any way; whoever renders a row with it says how
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
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"model.chat_template, line {error.lineno}: {error.message}") from None
    except Exception:  # it may refuse this conversation; rows are what it has to take
        return template
    return template


def unknown_marks(tokenizer: Any) -> list[str]:
    """Marks such as ``<|im_start|>`` that the template writes and the tokenizer takes to pieces."""
    if not isinstance(tokenizer.chat_template, str):
        return []
    marks = dict.fromkeys(re.findall(r"<\|[A-Za-z_]+\|>", tokenizer.chat_template))
    return [mark for mark in marks if len(tokenizer(mark, add_special_tokens=False).input_ids) > 1]
