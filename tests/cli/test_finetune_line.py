"""The last line of ``trimtab finetune``: what it offers to be pasted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.cli.verbs.finetune import _question


@pytest.mark.parametrize(
    ("verb", "prompt", "offered"),
    [
        ("predict", "is berth seven free? ", "is berth seven free?"),
        ("predict", "one text\nand the one that it is compared with", "..."),
        ("predict", "", "..."),
        ("predict", "fog " * 100, "..."),
        ("generate", "Message: fog\nAnswer:", "Message: fog\nAnswer:"),
        ("generate", "\x1b[31m", "..."),
    ],
)
def test_a_prompt_is_offered_that_can_be_pasted(verb: str, prompt: str, offered: str) -> None:
    run: Any = SimpleNamespace(sets=[SimpleNamespace(rows_after=[SimpleNamespace(prompt=prompt)])])
    assert _question(run, "completion", verb) == offered
