"""Fixtures of the evaluation tests: a tiny tokenizer, and rows to ask about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from trimtab.data.rows import Example

CORPUS = [
    "News: the profit of the firm rose by a third .\nAnswer: good",
    "News: sales fell and the firm closed a shop .\nAnswer: bad",
    "News: the meeting is on Monday .\nAnswer: plain",
    "Question: which one is it? Answer: answer1 answer2 answer3",
] * 3


WORDS = "the profit of the firm rose by a third and sales fell , a shop closed on Monday ."


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 360 tokens. Each digit is a token of its own, so answer1 begins answer10."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=360,
        special_tokens=["<|eos|>", "<|stop|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


@pytest.fixture
def questions() -> Callable[..., list[Example]]:
    """Make rows of different lengths whose answers go through a list; any number of them."""
    from evaluation_cases import example

    def make(answers: Sequence[str], rows: int = 23) -> list[Example]:
        words = WORDS.split()
        return [
            example(
                f"News: {' '.join(words[n % 5 : 6 + (7 * n) % 13])} {n}\nAnswer: ", answers[n % len(answers)], n + 1
            )
            for n in range(rows)
        ]

    return make
