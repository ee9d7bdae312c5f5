"""Text comes as soon as it is sure, and all of it comes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Sequence
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tiny_runs import spaced_tokenizer, tiny_tokenizer
from trimtab.data.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.mark.parametrize("text", ["fog over berth seven", "für 3 € – 日本語 🙂 ok", "\ufffd is a sign \ufffd"])
def test_pieces_are_the_text_and_end_with_whole_characters(tokenizer: Any, text: str) -> None:
    made, pieces = Detokenizer(tokenizer), []
    for token in tokenizer(text).input_ids:
        pieces.append(made.add(token))
    assert text.startswith("".join(pieces))
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + made.finish() == text


def test_what_goes_on_from_a_text_keeps_the_space_at_its_beginning() -> None:
    spaced = spaced_tokenizer()
    ids = spaced("fog over berth seven").input_ids
    for cut in range(len(ids)):
        made = Detokenizer(spaced, before=ids[:cut])
        said = "".join(made.add(token) for token in ids[cut:]) + made.finish()
        assert spaced.decode(ids[:cut]) + said == "fog over berth seven"


def test_what_goes_on_from_bytes_tells_none_of_them() -> None:
    vocabulary = {**{f"<0x{byte:02X}>": byte for byte in range(256)}, "a": 256}
    backend = Tokenizer(BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = Sequence([ByteFallback(), Fuse()])  # which shows a run of bytes whole, or none of it
    spelling = PreTrainedTokenizerFast(tokenizer_object=backend)
    for text in ("🙂日日", "日🙂🙂", "🙂" * 20):
        made = Detokenizer(spelling, before=spelling(text).input_ids)
        assert made.add(256) + made.finish() == "a"


def test_a_character_that_was_begun_before_is_told_whole(tokenizer: Any) -> None:
    ids = tokenizer("a €").input_ids
    made = Detokenizer(tokenizer, before=ids[:-1])
    assert made.add(ids[-1]) + made.finish() == "€"


def test_bytes_by_chance_come_as_they_are_decoded_whole(tokenizer: Any) -> None:
    drawn = random.Random(3)
    for _ in range(30):
        ids = [drawn.randrange(400) for _ in range(40)]
        made = Detokenizer(tokenizer, [7])
        said = "".join(made.add(token) for token in ids) + made.finish()
        whole = [token for token in ids if token != 7]
        assert said == tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
