"""What is shown before training: the text by token ids, special tokens and all, with the trained part marked."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from trimtab.data.preview import LONGEST, preview
from trimtab.data.rows import Example
from trimtab.data.tokens import encode, encode_all


def example(prompt: str, answer: str, number: int = 1) -> Example:
    text = prompt + answer
    return Example("rows.jsonl", number, text, ((len(prompt.rstrip(" ")), len(text)),), prompt, answer, True)


ROWS = [example("Profit rose 🙂 .\nAnswer: ", "neutral", n) for n in (3, 4, 5)]


def test_plain_text(tokenizer: Any, bos_tokenizer: Any) -> None:
    size = len(encode(ROWS[0], tokenizer, None)["input_ids"])
    assert str(preview(encode_all(ROWS, tokenizer, None), tokenizer, count=2)) == "\n\n".join(
        f"rows.jsonl, row {n}: {size} tokens, 2 trained\nProfit rose 🙂 .\nAnswer:[[ neutral<|eos|>]]" for n in (3, 4)
    )
    assert "<|bos|>Profit rose" in str(preview(encode_all(ROWS, bos_tokenizer, None), bos_tokenizer))


def test_encoded_rows_are_shown_as_they_were_cut(tokenizer: Any) -> None:
    rows = encode_all([example("", "x" * 50), *ROWS], tokenizer, 5)
    shown = str(preview(rows, tokenizer, count=1))
    assert shown == "rows.jsonl, row 3: 5 tokens, 2 trained\n\nAnswer:[[ neutral<|eos|>]]"


def test_several_trained_parts(tokenizer: Any) -> None:
    row = Example("a", 1, "one two three four", ((4, 7), (14, 18)), "one two three ", "four", False)
    assert str(preview(encode_all([row], tokenizer, None), tokenizer)).endswith("\none[[ two]] three[[ four]]")


def rendered(rows: Any, tokenizer: Any, **options: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=200, **options).print(preview(encode_all(rows, tokenizer, None), tokenizer))
    return out.getvalue()


def test_terminal_marks_by_style_and_a_pipe_by_brackets(tokenizer: Any) -> None:
    styled = rendered(ROWS, tokenizer, force_terminal=True, color_system="standard", legacy_windows=False)
    assert "\x1b[1;4;32m neutral<|eos|>\x1b[0m" in styled
    assert "[[" not in styled
    assert "Answer:[[ neutral<|eos|>]]" in rendered(ROWS, tokenizer, force_terminal=False)
    assert "[[ neutral" in rendered(ROWS, tokenizer, force_terminal=True, no_color=True, color_system=None)


@pytest.mark.parametrize("terminal", [True, False])
def test_rows_cannot_give_orders_to_the_terminal(tokenizer: Any, terminal: bool) -> None:
    shown = rendered([example("\x1b[2J[bold]news[/bold] [/] ", "neutral")], tokenizer, force_terminal=terminal)
    assert "\x1b[2J" not in shown
    assert "\\x1b[2J[bold]news[/bold] [/]" in shown


def test_long_rows_are_abridged_in_the_middle(tokenizer: Any) -> None:
    shown = str(preview(encode_all([example("A" + "news " * 2000 + "Z: ", "neutral")], tokenizer, None), tokenizer))
    assert "characters ..." in shown
    assert "Z:[[ neutral<|eos|>]]" in shown
    assert len(shown) < LONGEST + 200


def test_each_source_is_shown_and_a_repeated_row_once(tokenizer: Any) -> None:
    found = [example(f"p {n} ", "a", n) for n in (1, 2)] + [replace(example("q ", "b", 1), source="other.csv")]
    rows = encode_all(found, tokenizer, None).repeated([3, 3, 3])
    headings = [heading.split(":")[0] for heading, _ in preview(rows, tokenizer).rows]
    assert headings == ["rows.jsonl, row 1", "other.csv, row 1"]
    alone = encode_all(found[:2], tokenizer, None).repeated([3, 1])
    headings = [heading.split(":")[0] for heading, _ in preview(alone, tokenizer).rows]
    assert headings == ["rows.jsonl, row 1", "rows.jsonl, row 2"]
