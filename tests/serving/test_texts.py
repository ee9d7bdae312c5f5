"""The text of an answer and of its tokens, whatever a tokenizer does to spaces and to parts of characters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tiny_runs import CHATML, spaced_tokenizer, tiny_model, tiny_tokenizer
from trimtab.asking import Asked, Conversation, Drawing, _Speaking
from trimtab.data.tokens import encode_prompt
from trimtab.models import earlier_tokens
from trimtab.questions import rendered
from trimtab.serving.bodies import CompletionAsking, read_body
from trimtab.serving.requests import Chosen, Request
from trimtab.serving.shelf import Reads
from trimtab.serving.ticket import Ticket
from trimtab.serving.writing import Row

TEXT = "fog over berth seven and the crane is free"


def written(
    tokenizer: Any, prompt: list[int], answer: list[int], *, same_text: bool, spaces: int = 0
) -> tuple[str, list[Chosen]]:
    """What a row tells whose model writes ``answer``."""
    request = Request("base", tuple(prompt), logprobs=2, same_text=same_text, spaces=spaces)
    ticket = Ticket(request)
    row = Row(ticket, None, tokenizer, ends=(), stops=(), limit=len(answer), seconds=None)
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


@pytest.mark.parametrize(("spaces", "said"), [(0, " berth"), (1, "berth"), (2, "berth")])
def test_spaces_that_a_prompt_ends_with_are_not_said_again(spaces: int, said: str) -> None:
    tokenizer = tiny_tokenizer()
    answer = tokenizer(" berth").input_ids
    assert written(tokenizer, tokenizer("fog").input_ids, answer, same_text=True, spaces=spaces)[0] == said
    asked = read_body(CompletionAsking, b'{"model": "base", "prompt": ["fog  ", "fog"], "n": 2}')
    assert [one.spaces for one in asked.requests([[1], [1]], None)] == [2, 2, 0, 0]


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


def spelling_tokenizer() -> Any:
    """The template ends turns with a mark that is no token."""
    tokenizer = spaced_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "fog fog")
    return tokenizer


def test_the_end_of_a_turn_that_is_no_token_ends_an_answer_in_a_chat() -> None:
    tokenizer, model = spelling_tokenizer(), tiny_model(400)
    reads = Reads.of(model, tokenizer, None)
    assert reads.spelled == "fog fog"
    request = Request("base", (5,), stop=("noon",))
    assert reads.stops(request) == ("noon", "fog fog")
    assert reads.stops(replace(request, same_text=True)) == ("noon",)
    assert Reads.of(model, tiny_tokenizer(), None).stops(request) == ("noon",)


def test_what_generate_says_ends_with_it_too() -> None:
    tokenizer, said = spelling_tokenizer(), list[str]()
    speaking = _Speaking(tokenizer, [2], said.append, "fog fog")
    speaking.put(torch.tensor([5, 6]))  # the prompt
    for token in tokenizer("berth fog over fog fog and the crane").input_ids:
        speaking.put(torch.tensor([token]))
    speaking.end()
    assert "".join(said).rstrip() == "berth fog over"
    assert speaking.over
    assert speaking.text == "".join(said)


class Scripted(LlamaForCausalLM):
    """Writes one text after a prompt of ``self.read`` tokens."""

    script: tuple[int, ...] = ()
    read = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        cache = next(kwargs[name] for name in earlier_tokens.NAMES if name in kwargs)
        at = cache.get_seq_length() - self.read
        out.logits[:] = 0
        out.logits[:, -1, self.script[min(at, len(self.script) - 1)]] = 5
        return out


def test_a_conversation_keeps_no_end_of_a_turn() -> None:
    tokenizer = spelling_tokenizer()
    model = Scripted(tiny_model(len(tokenizer)).config).eval()
    model.script = tuple(tokenizer("berth seven fog fog and the crane").input_ids)
    conversation = Conversation(Asked(model, tokenizer), Drawing(20))
    model.read = len(encode_prompt(rendered([{"role": "user", "content": "free ?"}], tokenizer), tokenizer))
    answer = conversation.ask("free ?", lambda _: None)
    assert answer.ended
    assert conversation.messages[-1] == {"role": "assistant", "content": "berth seven"}
