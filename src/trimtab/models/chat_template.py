"""A model's chat template: where it comes from, and with what it ends a turn of the assistant.

A base model often ends its texts with one token (``<|endoftext|>``) and its chat template a turn with another
(``<|im_end|>``). What is trained on conversations learns to write the second, so generation has to stop there, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED = {"chatml": CHATML}
"""Templates that a configuration may name; all others are files or texts."""

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


def unknown_marks(tokenizer: Any) -> list[str]:
    """Marks such as ``<|im_start|>`` that the template writes and the tokenizer takes to pieces."""
    if not isinstance(tokenizer.chat_template, str):
        return []
    marks = dict.fromkeys(re.findall(r"<\|[A-Za-z_]+\|>", tokenizer.chat_template))
    return [mark for mark in marks if len(tokenizer(mark, add_special_tokens=False).input_ids) > 1]
