"""The file of tokenised rows: found again when nothing changed, not found when anything did, rebuilt when damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from trimtab.data import cache, tokens
from trimtab.data.rows import Example
from trimtab.data.tokens import EncodedRows, encode_all, encode_once

EXAMPLES = [
    Example("a.jsonl", 1, "Answer: neutral", ((7, 15),), "Answer: ", "neutral", True),
    Example("a.jsonl", 2, "", ((0, 0),), "", None, True),
    Example("a.jsonl", 3, "Profit rose . Answer: positive", ((21, 30),), "Profit rose . Answer: ", "positive", True),
]


def content(rows: EncodedRows) -> tuple[Any, ...]:
    return list(rows), rows.lengths, rows.origins, rows.dropped, rows.cut


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After this is called, rows can only come from the cache."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the rows were tokenised again")

    return lambda: monkeypatch.setattr(tokens, "_tokenise", refuse)


def test_second_run_reads_the_file(tokenizer: Any, tmp_path: Path, no_tokenising: Callable[[], None]) -> None:
    plain = encode_all(EXAMPLES, tokenizer, 6)
    first = encode_once(EXAMPLES, tokenizer, 6, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    assert path.suffix == ".safetensors"
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"ids", "trained", "lengths", "kept", "cut"}
    no_tokenising()
    second = encode_once(EXAMPLES, tokenizer, 6, tmp_path / "cache")
    assert content(plain) == content(first) == content(second)
    assert first.dropped == [("a.jsonl", 2, "it is empty")]
    assert first.cut == 1


def test_where_rows_come_from_is_not_in_the_key(
    tokenizer: Any, tmp_path: Path, no_tokenising: Callable[[], None]
) -> None:
    encode_once(EXAMPLES, tokenizer, None, tmp_path)
    no_tokenising()
    moved = [replace(example, source="b.jsonl", number=example.number + 10) for example in EXAMPLES]
    rows = encode_once(moved, tokenizer, None, tmp_path)
    assert rows.origins == [("b.jsonl", 11), ("b.jsonl", 13)]
    assert rows.dropped == [("b.jsonl", 12, "it is empty")]


def test_key_depends_on_all_that_matters(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()

    def key(examples: list[Example] = EXAMPLES, tokenizer: Any = tokenizer, max_length: int | None = 6) -> Path:
        return tokens.cache_file(tmp_path, examples, tokenizer, max_length)

    first = EXAMPLES[0]
    other_end = make_tokenizer()
    other_end.eos_token = "<|im_end|>"
    grown = make_tokenizer()
    grown.add_tokens(["neutral"])
    different = [
        key(),
        key(max_length=7),
        key(max_length=None),
        key(EXAMPLES[:2]),
        key([EXAMPLES[1], EXAMPLES[0], EXAMPLES[2]]),
        key([replace(first, text="Answer: neutraL"), *EXAMPLES[1:]]),
        key([replace(first, trained=((8, 15),)), *EXAMPLES[1:]]),
        key([replace(first, ends=False), *EXAMPLES[1:]]),
        key([replace(first, answer=None), *EXAMPLES[1:]]),
        key(tokenizer=make_tokenizer(bos=True)),
        key(tokenizer=other_end),
        key(tokenizer=grown),
    ]
    assert len(set(different)) == len(different)
    # A tokenizer remembers how it was last called; that is no difference.
    before = key()
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert key() == before
    assert key(tokenizer=make_tokenizer()) == before


@pytest.mark.parametrize("damage", ["one bit", "half", "empty", "other content"])
def test_damaged_file_is_made_anew(tokenizer: Any, tmp_path: Path, damage: str, caplog: Any) -> None:
    whole = content(encode_once(EXAMPLES, tokenizer, None, tmp_path))
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    assert cache.load(path) is not None
    bad = {
        "one bit": good[:-1] + bytes([good[-1] ^ 1]),
        "half": good[: len(good) // 2],
        "empty": b"",
        "other content": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    }[damage]
    path.write_bytes(bad)
    with caplog.at_level(logging.WARNING):
        assert content(encode_once(EXAMPLES, tokenizer, None, tmp_path)) == whole
    assert "damaged" in caplog.text
    assert cache.load(path) is not None


def test_folder_that_cannot_be_written(tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        rows = encode_once(EXAMPLES, tokenizer, None, tmp_path / "file")
    assert len(rows) == 2
    assert "could not be kept" in caplog.text
