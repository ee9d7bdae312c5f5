"""Pairs of identifiers: reproducible, a token a character, trained on the value alone, measured as written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from identifiers import character_accuracy, draw_pairs, encode_pairs, recall
from tiny_runs import tiny_model, tiny_tokenizer
from trimtab.errors import ConfigError, ModelError


def test_pairs_are_reproducible_and_distinct() -> None:
    pairs = draw_pairs(100, 2, seed=7)
    assert pairs == draw_pairs(100, 2, seed=7)
    assert pairs != draw_pairs(100, 2, seed=8)
    assert len({key for key, _ in pairs}) == 100  # of 256 there are
    assert all(len(word) == 2 and set(word) <= set("0123456789abcdef") for pair in pairs for word in pair)
    assert len({value for _, value in draw_pairs(1000, 32, seed=0)}) == 1000


def test_too_many_pairs() -> None:
    draw_pairs(8, 1, seed=0)
    with pytest.raises(ConfigError, match=r"9 keys of 1 hexadecimal digits would be more than half .* \(16\)"):
        draw_pairs(9, 1, seed=0)


def test_a_token_a_character_and_labels_on_the_value_alone() -> None:
    tokenizer = tiny_tokenizer()
    rows = encode_pairs([("dead", "beef"), ("0f1e", "2d3c")], tokenizer)
    assert rows.input_ids.shape == (2, 9)
    assert tokenizer.convert_ids_to_tokens(rows.input_ids[0].tolist()) == list("dead:beef")
    assert rows.prompt == 5
    assert (rows.labels[:, :5] == -100).all()
    assert torch.equal(rows.labels[:, 5:], rows.input_ids[:, 5:])
    assert rows.values == ("beef", "2d3c")


def test_the_tokenizers_own_beginning_comes_first() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    rows = encode_pairs([("ab", "cd")], tokenizer)
    assert rows.input_ids[0, 0] == begin
    assert rows.prompt == 4
    assert (rows.labels[0] != -100).tolist() == [False] * 4 + [True] * 2


def test_a_vocabulary_without_the_digits() -> None:
    words = {"<unk>": 0, **{one: place for place, one in enumerate("0123456789abcde", 1)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<unk>")), unk_token="<unk>")
    with pytest.raises(ModelError, match="no token for the single characters f :"):
        encode_pairs([("a", "b")], tokenizer)


@pytest.mark.parametrize(
    ("written", "share"),
    [
        (["abcd", "0123"], 1.0),
        (["abcx", "0123"], 7 / 8),
        (["bcd", "0123"], 4 / 8),  # shifted by one: every place is wrong
        (["ab", "01234567"], 6 / 8),  # too short, and too long
        (["", "3210"], 0.0),
    ],
)
def test_character_accuracy(written: list[str], share: float) -> None:
    assert character_accuracy(written, ["abcd", "0123"]) == pytest.approx(share)


class Oracle(nn.Module):
    """Put behind a model's head: logits that continue each row as ``rows`` has it, in ``wrong`` places otherwise."""

    def __init__(self, rows: Any, wrong: dict[int, int]) -> None:
        super().__init__()
        self.rows, self.wrong, self.seen = rows, wrong, []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(ids.clone())
        logits = torch.zeros(*ids.shape, 400)
        place = self.rows.prompt + len(self.seen) - 1
        for row in range(len(ids)):
            token = self.wrong.get(place, int(self.rows.input_ids[row, place]))
            logits[row, -1, token] = 1.0
        return logits


@pytest.mark.parametrize(("wrong", "share"), [({}, 1.0), ({6: 5}, 0.75)])
def test_recall_feeds_back_what_was_written(wrong: dict[int, int], share: float) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    rows = encode_pairs([("dead", "beef"), ("0f1e", "2d3c")], tokenizer)
    oracle = Oracle(rows, wrong)

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        output.logits = oracle(kwargs["input_ids"])
        return output

    model.register_forward_hook(replace, with_kwargs=True)
    assert tokenizer.decode([5]) not in "0123456789abcdef"
    model.train()
    assert recall(model, tokenizer, rows) == pytest.approx(share)
    assert model.training
    assert torch.equal(oracle.seen[0], rows.input_ids[:, :5])  # the key alone
    last = [5, 5] if wrong else rows.input_ids[:, 6].tolist()
    assert oracle.seen[2][:, -1].tolist() == last
