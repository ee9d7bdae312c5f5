"""The text of an answer and of its tokens, whatever a tokenizer does to spaces and to parts of characters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_runs import spaced_tokenizer, tiny_tokenizer
from trimtab.serving.requests import Chosen, Request
from trimtab.serving.ticket import Ticket
from trimtab.serving.writing import Row

TEXT = "fog over berth seven and the crane is free"


def written(tokenizer: Any, prompt: list[int], answer: list[int], *, same_text: bool) -> tuple[str, list[Chosen]]:
    """What a row tells whose model writes ``answer``."""
    request = Request("base", tuple(prompt), logprobs=2, same_text=same_text)
    ticket = Ticket(request)
    row = Row(ticket, None, tokenizer, ends=(), limit=len(answer), seconds=None)
    for token in answer:
        logits = torch.zeros(len(tokenizer))
        logits[token] = 5.0
        row.choose(logits, token)
    pieces = list(ticket)
    return "".join(one.text for one in pieces), [chosen for one in pieces for chosen in one.chosen]


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_an_answer_goes_on_in_the_text_of_its_prompt(cut: int) -> None:
    tokenizer = spaced_tokenizer()
    ids = tokenizer(TEXT).input_ids
    said, chosen = written(tokenizer, ids[:cut], ids[cut:], same_text=True)
    assert tokenizer.decode(ids[:cut]) + said == TEXT
    assert "".join(one.text for one in chosen) == said
    assert [said[one.offset :][: len(one.text)] for one in chosen] == [one.text for one in chosen]
    assert all(one.top[0].text == one.text for one in chosen)


def test_an_answer_that_is_a_text_of_its_own_begins_with_its_first_word() -> None:
    tokenizer = spaced_tokenizer()
    ids = tokenizer(TEXT).input_ids
    said, chosen = written(tokenizer, ids, ids, same_text=False)
    assert said == TEXT
    assert "".join(one.text for one in chosen) == said


def test_parts_of_a_character_begin_where_it_does() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("€ 日 fog").input_ids
    said, chosen = written(tokenizer, [5], [3, *ids], same_text=True)  # a special token is no text
    assert said == "€ 日 fog"
    for one in chosen:
        if "\ufffd" not in one.text and one.token != 3:
            assert said[one.offset :].startswith(one.text)
    assert b"".join(one.raw for one in chosen if one.token != 3).decode() == said
