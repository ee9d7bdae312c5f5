"""Token ids and labels, held against plain decoding: the boundary, the ends, cutting, and what is left out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from trimtab.data import tokens
from trimtab.data.forms import read_examples
from trimtab.data.rows import EncodedRow, Example
from trimtab.data.tokens import encode, encode_all, encode_flat, encode_once, encode_pair, encode_prompt
from trimtab.errors import DataError
from trimtab.models.causal_head import IGNORED

CONTEXT = "Instruction: What is the sentiment of this news?\nInput: Profit rose .\nAnswer: "


def pair(prompt: str, answer: str, *, ends: bool = True, number: int = 1) -> Example:
    start = len(prompt.rstrip(" "))
    text = prompt + answer
    return Example("rows.jsonl", number, text, ((start, len(text)),), prompt, answer, ends)


def plain(text: str, number: int = 1) -> Example:
    return Example("rows.jsonl", number, text, ((0, len(text)),), "", None, True)


def trained_tokens(encoded: EncodedRow, tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens([label for label in encoded["labels"] if label != IGNORED])


def check_labels(encoded: EncodedRow, prompt: str, answer: str, end: str, tokenizer: Any) -> None:
    """By decoding alone: what carries no loss reads as the prompt, what carries loss as the answer and its end."""
    assert len(encoded["input_ids"]) == len(encoded["labels"])
    assert all(label in (IGNORED, token) for token, label in zip(*vars_of(encoded), strict=True))
    first = next(index for index, label in enumerate(encoded["labels"]) if label != IGNORED)
    assert all(label != IGNORED for label in encoded["labels"][first:])
    assert tokenizer.decode(encoded["input_ids"][:first]) == prompt
    assert tokenizer.decode(encoded["input_ids"][first:]) == answer + end


def vars_of(encoded: EncodedRow) -> tuple[list[int], list[int]]:
    return encoded["input_ids"], encoded["labels"]


def test_the_space_is_the_answers(tokenizer: Any) -> None:
    encoded = encode(pair("Answer: ", "neutral"), tokenizer, None)
    assert trained_tokens(encoded, tokenizer) == ["Ġneutral", "<|eos|>"]
    check_labels(encoded, "Answer:", " neutral", "<|eos|>", tokenizer)


def test_the_space_is_the_answers_in_smollm2(smollm2: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"context": "Instruction: choose.\\nAnswer: ", "target": "neutral"}')
    (example,) = read_examples("a.jsonl", smollm2, root=tmp_path)
    encoded = encode(example, smollm2, None)
    assert trained_tokens(encoded, smollm2) == ["Ġneutral", "<|im_end|>"]
    check_labels(encoded, "Instruction: choose.\nAnswer:", " neutral", "<|im_end|>", smollm2)
    # The wrong way, for contrast: tokenised apart, the space is a token of its own.
    assert smollm2.convert_ids_to_tokens(smollm2("Answer: ")["input_ids"])[-1] == "Ġ"
    # SmolLM2 has no " 5": the space is a token, and the answer's first.
    ids, first = encode_pair("Answer: ", "5", smollm2, end=True)
    assert smollm2.convert_ids_to_tokens(ids) == ["Answer", ":", "Ġ", "5", "<|im_end|>"]
    assert first == 2


def test_joined_without_a_space(tokenizer: Any) -> None:
    encoded = encode(pair("Answer:", "neutral"), tokenizer, None)
    check_labels(encoded, "Answer:", "neutral", "<|eos|>", tokenizer)


def test_a_token_over_the_boundary_is_the_answers(tokenizer: Any) -> None:
    # "positive" is one token, and the boundary falls inside it.
    assert len(tokenizer(" positive")["input_ids"]) == 1
    encoded = encode(pair("Answer: posi", "tive"), tokenizer, None)
    assert trained_tokens(encoded, tokenizer) == ["Ġpositive", "<|eos|>"]
    ids, first = encode_pair("Answer: posi", "tive", tokenizer, end=False)
    assert tokenizer.decode(ids[first:]) == " positive"


def metaspace() -> tuple[Any, Any, str, list[str]]:
    """As in Llama 2 and Mistral: a space is a mark before its word, and one comes before the text."""
    return pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first"), "▁", []


def llama3() -> tuple[Any, Any, str, list[str]]:
    """As in Llama 3 and Qwen: a word takes the sign before it along, and a sign the line breaks after it."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, level]), decoders.ByteLevel(), "Ġ", level.alphabet()


@pytest.mark.parametrize("kind", [metaspace, llama3])
def test_other_ways_of_marking_a_space(kind: Callable[[], tuple[Any, Any, str, list[str]]]) -> None:
    cutter, decoder, space, alphabet = kind()
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = cutter, decoder
    # No line break beside a letter: a vocabulary that had merged them would have no boundary there.
    corpus = ["Answer: neutral", "neutral", "Answer: 5", ":\n", "\n\n", "x"] * 3
    backend.train_from_iterator(
        corpus, BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    for prompt, answer, expected in [
        ("Answer: ", "neutral", [space + "neutral", "</s>"]),
        ("Answer: ", "5", [space, "5", "</s>"] if kind is llama3 else [space + "5", "</s>"]),
        ("Answer:\n", "neutral", ["neutral", "</s>"]),
        ("Answer:\n\n", "neutral", ["neutral", "</s>"]),
    ]:
        encoded = encode(pair(prompt, answer), tokenizer, None)
        found = "".join(trained_tokens(encoded, tokenizer))
        assert found == "".join(expected)
        ids, first = encode_pair(prompt, answer, tokenizer, end=True)
        assert (ids, ids[first:]) == (encoded["input_ids"], [label for label in encoded["labels"] if label != IGNORED])
        assert encode_prompt(prompt, tokenizer) == ids[:first]
        assert tokenizer.decode(ids) == prompt + answer + "</s>"


def random_text(chance: random.Random) -> str:
    pieces = [
        "neutral",
        "Answer",
        ":",
        ".",
        "\n",
        "\n\n",
        "  ",
        " ",
        "5",
        "42",
        "é",
        "🙂",
        "日本",
        "\t",
        "don't",
        "<b>",
    ]
    return "".join(chance.choice(pieces) for _ in range(chance.randint(1, 12)))


@pytest.mark.parametrize("name", ["tokenizer", "smollm2"])
def test_labels_against_decoding_on_many_texts(request: Any, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    chance = random.Random(0)
    checked = 0
    while checked < 300:
        prompt, answer = random_text(chance), random_text(chance).strip()
        if not answer or not prompt.strip():
            continue
        prompt = prompt if prompt[-1].isspace() else prompt + chance.choice([" ", "\n"])
        if prompt[-1] == " ":
            prompt = prompt.rstrip(" ") + " "
        encoded = encode(pair(prompt, answer), tokenizer, None)
        head = prompt.rstrip(" ")
        check_labels(encoded, head, (prompt + answer)[len(head) :], tokenizer.eos_token, tokenizer)
        ids, first = encode_pair(prompt, answer, tokenizer, end=True)
        assert ids == encoded["input_ids"]
        assert encoded["labels"] == [IGNORED] * first + ids[first:]
        # What is generated from is what came before the answer in training.
        assert encode_prompt(prompt, tokenizer) == ids[:first]
        checked += 1


def test_prompt_for_generation(tokenizer: Any, bos_tokenizer: Any) -> None:
    assert tokenizer.decode(encode_prompt("Answer:  ", tokenizer)) == "Answer:"
    assert tokenizer.decode(encode_prompt("Answer:", tokenizer)) == "Answer:"
    assert bos_tokenizer.decode(encode_prompt("Answer: ", bos_tokenizer)) == "<|bos|>Answer:"
    assert encode_prompt("", tokenizer) == []
    assert encode_prompt("", bos_tokenizer) == [bos_tokenizer.bos_token_id]


def test_first_position_carries_no_loss(tokenizer: Any, bos_tokenizer: Any) -> None:
    encoded = encode(plain("Profit rose ."), tokenizer, None)
    assert encoded["labels"] == [IGNORED, *encoded["input_ids"][1:]]
    assert tokenizer.decode(encoded["input_ids"]) == "Profit rose .<|eos|>"
    encoded = encode(plain("Profit rose ."), bos_tokenizer, None)
    assert encoded["labels"] == [IGNORED, *encoded["input_ids"][1:]]
    assert bos_tokenizer.decode(encoded["input_ids"]) == "<|bos|>Profit rose .<|eos|>"
    encoded = encode(pair("", "neutral", ends=True), tokenizer, None)
    assert encoded["labels"] == [IGNORED, *encoded["input_ids"][1:]]


def test_bos_comes_once_and_the_end_is_ours_alone(bos_tokenizer: Any) -> None:
    ids = bos_tokenizer("a")["input_ids"]
    assert (ids[0], ids[-1]) == (bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id)
    for text, ends, expected in [
        ("Answer: neutral", True, "<|bos|>Answer: neutral<|eos|>"),
        ("Answer: neutral", False, "<|bos|>Answer: neutral"),
        ("<|bos|>Answer: neutral", False, "<|bos|>Answer: neutral"),
    ]:
        encoded = encode(pair(text.removesuffix("neutral"), "neutral", ends=ends), bos_tokenizer, None)
        assert bos_tokenizer.decode(encoded["input_ids"]) == expected
        assert trained_tokens(encoded, bos_tokenizer) == ["Ġneutral"] + ["<|eos|>"] * ends
    ids, first = encode_pair("<|bos|>Answer: ", "neutral", bos_tokenizer, end=True)
    assert bos_tokenizer.decode(ids[:first]) == "<|bos|>Answer:"


def test_cutting_takes_from_the_left_of_the_prompt(tokenizer: Any, bos_tokenizer: Any) -> None:
    for each in (tokenizer, bos_tokenizer):
        head = 1 if each is bos_tokenizer else 0
        row = pair(CONTEXT, "neutral")
        whole = encode(row, each, None)["input_ids"]
        for limit in range(len(whole) + 2, 2 + head, -1):
            encoded = encode(row, each, limit)
            kept = min(limit, len(whole))
            assert encoded["input_ids"] == whole[:head] + whole[len(whole) - kept + head :]
            assert trained_tokens(encoded, each) == ["Ġneutral", "<|eos|>"]
            assert encode_all([row], each, limit).cut == (limit < len(whole))
        # The answer and its end take two; one more must come before them, and a BOS will do.
        assert len(encode(pair(CONTEXT, "neutral"), each, 3)["input_ids"]) == 3
        with pytest.raises(DataError, match=r"^rows\.jsonl, row 1: max_length 2 leaves no room for its answer"):
            encode(pair(CONTEXT, "neutral"), each, 2)


def test_cutting_plain_text_takes_from_the_right(tokenizer: Any, bos_tokenizer: Any) -> None:
    for each in (tokenizer, bos_tokenizer):
        whole = encode(plain("Profit rose . Sales fell ."), each, None)
        encoded = encode(plain("Profit rose . Sales fell ."), each, 5)
        assert encoded["input_ids"] == whole["input_ids"][:5]
        assert encoded["labels"] == whole["labels"][:5]
        assert encode_all([plain("Profit rose . Sales fell .")], each, 5).cut == 1
        with pytest.raises(DataError, match="max_length 1 leaves it no token"):
            encode(plain("Profit rose ."), each, 1)


def test_cutting_a_conversation_keeps_the_last_answer(
    tokenizer: Any, tmp_path: Path, jsonl: Callable[..., str]
) -> None:
    messages = [{"role": role, "content": f"an answer {n}"} for n in range(3) for role in ("user", "assistant")]
    (example,) = read_examples(jsonl({"messages": messages}), tokenizer, root=tmp_path)
    whole = encode(example, tokenizer, None)
    assert tokenizer.decode([label for label in whole["labels"] if label != IGNORED]) == "".join(
        f"an answer {n}<|im_end|>" for n in range(3)
    )
    size = len(tokenizer("an answer 2<|im_end|>")["input_ids"])
    encoded = encode(example, tokenizer, size + 1)
    assert encoded["input_ids"] == whole["input_ids"][-size - 1 :]
    assert tokenizer.decode([label for label in encoded["labels"] if label != IGNORED]) == "an answer 2<|im_end|>"


def test_all_rows_at_once_are_as_one_by_one(tokenizer: Any) -> None:
    chance = random.Random(1)
    words = ["profit", "sales", "rose", "fell", "neutral", "news", "🙂"]
    examples = [pair(" ".join(chance.choices(words, k=chance.randint(1, 30))) + ": ", "neutral") for _ in range(2500)]
    rows = encode_all(examples, tokenizer, 40)
    assert len(rows) == 2500
    for index in (0, 1, 999, 1000, 1001, 2499):
        one = encode(examples[index], tokenizer, 40)
        assert rows[index] == {"input_ids": one["input_ids"], "labels": one["labels"]}
    assert rows[-1] == rows[2499]
    assert rows.lengths == [len(row["input_ids"]) for row in rows]
    assert rows.cut == sum(encode(example, tokenizer, None) != encode(example, tokenizer, 40) for example in examples)
    assert 0 < rows.cut < 2500
    with pytest.raises(IndexError):
        rows[2500]


def test_rows_left_out_are_listed(tokenizer: Any) -> None:
    examples = [
        plain("", number=1),
        plain("Profit rose .", number=2),
        pair("Answer: ", "neutral negative positive news profit", number=3),
        pair("Answer: ", "neutral", number=4),
        plain("x", number=5),
    ]
    rows = encode_all(examples, tokenizer, 4)
    assert rows.origins == [("rows.jsonl", 2), ("rows.jsonl", 4), ("rows.jsonl", 5)]
    assert [(source, number) for source, number, _ in rows.dropped] == [("rows.jsonl", 1), ("rows.jsonl", 3)]
    assert rows.dropped[0][2] == "it is empty"
    assert "max_length 4 leaves no room" in rows.dropped[1][2]


def test_text_of_one_token_and_no_end(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="single token"):
        encode(pair("", "neutral"[:1], ends=False), tokenizer, None)


def test_nothing_left_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"None of the 2 rows.*rows\.jsonl, row 1: it is empty"):
        encode_all([plain(""), plain("", number=2)], tokenizer, None)
    with pytest.raises(DataError, match="there are no rows"):
        encode_all([], tokenizer, None)


def test_slow_tokenizer_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False

    for call in (
        lambda: encode(plain("a"), SlowTokenizer(), None),
        lambda: encode_all([plain("a")], SlowTokenizer(), None),
        lambda: encode_once([plain("a")], SlowTokenizer(), None, Path("unused")),
        lambda: encode_pair("a", "b", SlowTokenizer(), end=False),
    ):
        with pytest.raises(DataError, match="SlowTokenizer is a slow tokenizer"):
            call()


def test_tokenizer_without_an_end(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode(plain("Profit rose ."), tokenizer, None)
    assert encode(pair("Answer: ", "neutral", ends=False), tokenizer, None)["labels"][-1] != IGNORED


def test_a_very_long_text_is_cut_as_a_shorter_one_would_be(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "Profit rose and sales fell .\nThe firm grew news " * 300
    text = Example("a", 1, words, ((0, len(words)),), "", None, True)
    answered = Example("a", 2, words + "last", ((20, 30), (len(words), len(words) + 4)), words, "last", True)
    blank = " " * 20_000 + "end"  # fewer tokens than characters by far
    spaces = Example("a", 3, blank, ((0, len(blank)),), "", None, True)
    giant = Example("a", 4, "q: " + words, ((3, len(words) + 3),), "q: ", words, True)
    wanted = encode_flat([text, answered, spaces, giant], tokenizer, 16)
    sizes: list[int] = []
    whole = tokens._tokenise
    monkeypatch.setattr(tokens, "LONG", 1000)
    monkeypatch.setattr(tokens, "_tokenise", lambda texts, t: (sizes.extend(map(len, texts)), whole(texts, t))[1])
    found = encode_flat([text, answered, spaces, giant], tokenizer, 16)
    assert found[1] == wanted[1]
    assert all(torch.equal(found[0][name], wanted[0][name]) for name in wanted[0])
    assert sizes[:2] == [64 * 16, 64 * 16 + 4]
    assert sizes[3] == 64 * 16
    assert found[1] == [(3, "max_length 16 leaves no room for its answer and a prompt before it")]
