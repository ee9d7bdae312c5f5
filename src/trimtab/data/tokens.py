"""Examples become token ids and labels.

Prompt and answer are tokenised as one text: if they were tokenised apart, the space before the answer would become a
token of its own. The boundary is found by character offsets: a token belongs to the answer if it ends after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from trimtab.data import cache
from trimtab.data.cache import Dropped, Tensors
from trimtab.data.rows import EncodedRow, Example
from trimtab.errors import DataError
from trimtab.models.causal_head import IGNORED
from trimtab.reading import panics

VERSION = 1
"""Part of the name of every file of tokenised rows; raise it when the same rows would be encoded differently."""

CHUNK, CHARACTERS = 1000, 2_000_000
"""Texts and characters handed to the tokenizer at once: enough to keep all its threads busy, and few enough that their
offsets take little memory."""


LONG, LONG_TOKEN = 500_000, 64
"""Characters: of a text longer than the first, only what lies within so many for each token that is kept is looked at.
Tokens have four on average."""


class EncodedRows(Dataset[EncodedRow]):
    """A map-style dataset of encoded rows, which are kept end to end in a few flat tensors.

    Raises DataError if there is no row.

    Args:
        tensors: ``ids``, int32 ``[tokens]``, all rows end to end; ``trained``, bool ``[tokens]``, whether the token
            carries loss; ``lengths``, int64 ``[rows]``; ``kept``, int64 ``[rows]``, the index of each row's example;
            ``cut``, bool ``[rows]``, whether the row was shortened to ``max_length``.
        dropped: index and reason for each example that has no row.
        examples: those that were encoded.

    Attributes:
        lengths: tokens of each row.
        origins: ``(source, number)`` of each row's example.
        cut: how many rows were shortened to ``max_length``.
        dropped: ``(source, number, reason)`` of each example that was left out.
    """

    def __init__(self, tensors: Tensors, dropped: Dropped, examples: Sequence[Example]) -> None:
        self._ids, self._trained, lengths = tensors["ids"], tensors["trained"], tensors["lengths"]
        self._starts: list[int] = (lengths.cumsum(0) - lengths).tolist()
        self.lengths: list[int] = lengths.tolist()
        self._kept: list[int] = tensors["kept"].tolist()
        self.origins = [(examples[at].source, examples[at].number) for at in self._kept]
        self.cut = int(tensors["cut"].sum())
        self.dropped = [(examples[at].source, examples[at].number, reason) for at, reason in dropped]
        if not self.lengths:
            listed = "; ".join(f"{source}, row {number}: {reason}" for source, number, reason in self.dropped[:3])
            listed = listed or "there are no rows"
            raise DataError(f"None of the {len(examples)} rows has a token to train on ({listed}).")

    def repeated(self, times: Sequence[int]) -> EncodedRows:
        """The rows as they come in an epoch: ``times[i]`` is how often that of the i-th example does.

        Repeated rows share their tokens. What is ``cut`` and ``dropped`` is counted once, as before.
        """
        if all(count == 1 for count in times):
            return self
        repeated = copy(self)
        order = [row for row, example in enumerate(self._kept) for _ in range(times[example])]
        repeated._starts = [self._starts[row] for row in order]
        repeated._kept = [self._kept[row] for row in order]
        repeated.lengths = [self.lengths[row] for row in order]
        repeated.origins = [self.origins[row] for row in order]
        return repeated

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> EncodedRow:
        row = slice(self._starts[index], self._starts[index] + self.lengths[index])
        ids = self._ids[row]
        return {"input_ids": ids.tolist(), "labels": torch.where(self._trained[row], ids, IGNORED).tolist()}

    def vocabulary(self) -> list[int]:
        """Every token that is in some row, once."""
        found: list[int] = self._ids.unique().tolist()
        return found

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[index] for index in range(len(self)))


def encode(example: Example, tokenizer: Any, max_length: int | None) -> EncodedRow:
    """Token ids and labels of one example.

    A text longer than ``max_length`` tokens is cut. If it has an answer, the prompt is cut from the left; the last
    answer is kept whole, with at least one token before it. If it has none, the text is cut from the right, and no
    end-of-sequence token follows. Special tokens that the tokenizer puts before a text are never cut. Those that it
    puts after one are left out: ``example.ends`` says whether an end-of-sequence token follows.

    Raises DataError if no token is left to train on, or if the tokenizer gives no offsets or has no end-of-sequence
    token.
    """
    result = next(_encode_each([example], tokenizer, max_length))
    if isinstance(result, str):
        raise DataError(f"{example.place}: {result}.")
    return result[0]


def encode_pair(prompt: str, answer: str, tokenizer: Any, *, end: bool) -> tuple[list[int], int]:
    """Token ids of ``prompt + answer`` as one text, and the index of the answer's first token.

    The two are joined as they are; ``Example.prompt`` ends with the white space that belongs between them. Spaces at
    the end of the prompt count as the answer's. With ``end``, the end-of-sequence token is the last id.
    """
    prefix = _prefix(tokenizer)
    ids, offsets = _with_prefix(*_tokenise([prompt + answer], tokenizer)[0], prefix)
    first = _first_after(offsets, len(prompt.rstrip(" ")))
    return ([*ids, _end_id(tokenizer)] if end else ids), first


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """The token ids to generate an answer from: those of ``encode_pair`` up to the answer's first token.

    Spaces at the end of the prompt are left out, since the answer's first token includes its own. The result is empty
    if the prompt is empty and the tokenizer puts nothing before a text.
    """
    # White space is tokenised differently at the end of a text and before a word ("\n\n" is one token or two), so a
    # letter stands in for the answer. After anything else, the letter might merge with the end of the prompt.
    ids, first = encode_pair(prompt, "x" if prompt[-1:].isspace() else "", tokenizer, end=False)
    return ids[:first]


def encode_all(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> EncodedRows:
    """Encode every example as ``encode`` does, in batches.

    Examples without a trained token are left out and listed in ``.dropped``. Raises DataError if no example is left,
    or if the tokenizer gives no offsets or has no end-of-sequence token.
    """
    return EncodedRows(*encode_flat(examples, tokenizer, max_length), examples)


def encode_once(examples: Sequence[Example], tokenizer: Any, max_length: int | None, folder: Path) -> EncodedRows:
    """Encode rows as ``encode_all`` does, and keep the result in ``folder`` for the next run.

    Rows are found again by everything that their encoding depends on (``cache_file``). A damaged file is made anew. If
    the file cannot be written, a warning is logged and the rows are used all the same.
    """
    require_fast(tokenizer)
    path = cache_file(folder, examples, tokenizer, max_length)
    kept = cache.load(path)
    if kept is None:
        kept = encode_flat(examples, tokenizer, max_length)
        cache.keep(path, *kept)
    return EncodedRows(*kept, examples)


def cache_file(folder: Path, examples: Iterable[Example], tokenizer: Any, max_length: int | None) -> Path:
    """The file for these rows. Its name is a digest of everything that their encoding depends on."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation are those of the tokenizer's last call, and encoding uses neither.
    content.pop("padding", None)
    content.pop("truncation", None)
    digest = hashlib.sha256(json.dumps([VERSION, content, tokenizer.eos_token_id, max_length]).encode())
    for example in examples:
        digest.update(json.dumps([example.text, example.trained, example.answer is None, example.ends]).encode())
    return folder / f"{digest.hexdigest()}.safetensors"


def encode_flat(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> tuple[Tensors, Dropped]:
    """The tensors of `EncodedRows`, and the examples that have no row."""
    ids: list[torch.Tensor] = [torch.zeros(0, dtype=torch.int32)]
    trained: list[torch.Tensor] = [torch.zeros(0, dtype=torch.bool)]
    kept: list[int] = []
    cut: list[bool] = []
    dropped: Dropped = []
    for index, result in enumerate(_encode_each(examples, tokenizer, max_length)):
        if isinstance(result, str):
            dropped.append((index, result))
            continue
        row, was_cut = result
        ids.append(torch.tensor(row["input_ids"], dtype=torch.int32))
        trained.append(torch.tensor(row["labels"]) != IGNORED)
        kept.append(index)
        cut.append(was_cut)
    tensors = {
        "ids": torch.cat(ids),
        "trained": torch.cat(trained),
        "lengths": torch.tensor([len(row) for row in ids[1:]], dtype=torch.int64),
        "kept": torch.tensor(kept, dtype=torch.int64),
        "cut": torch.tensor(cut, dtype=torch.bool),
    }
    return tensors, dropped


def _encode_each(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None
) -> Iterator[tuple[EncodedRow, bool] | str]:
    """Each example's row and whether it was shortened to ``max_length``, or the reason why it has none."""
    prefix = _prefix(tokenizer)
    end = _end_id(tokenizer) if any(example.ends for example in examples) else -1
    for chunk in _chunks(examples, max_length):
        near = [_near(example, max_length) for example in chunk]
        tokens = _tokenise([example.text for example in near], tokenizer)
        for whole, example, (ids, offsets) in zip(chunk, near, tokens, strict=True):
            if example is not whole and max_length is not None and len(ids) <= 2 * max_length:
                # Its tokens are uncommonly long, so the part was too short.
                example, [(ids, offsets)] = whole, _tokenise([whole.text], tokenizer)
            ids, offsets = _with_prefix(ids, offsets, prefix)
            yield _encode_one(example, ids, offsets, head=len(prefix), end=end, max_length=max_length)


def _near(example: Example, max_length: int | None) -> Example:
    """The part of a very long text that can be left when it is cut to ``max_length`` tokens, and much around it.

    A text of ten million characters takes gigabytes and minutes to tokenise, and a thousand of its tokens are kept.
    Its tokens near the cut do not depend on what is that far away.
    """
    room = LONG_TOKEN * max_length if max_length is not None else len(example.text)
    if len(example.text) <= max(LONG, 2 * room):
        return example
    if example.answer is None:
        spans = ((start, min(end, room)) for start, end in example.trained if start < room)
        return replace(example, text=example.text[:room], trained=tuple(spans))
    answer = example.trained[-1][0]
    if len(example.text) - answer > 2 * room:  # an answer for which there is no room
        return replace(example, text=example.text[answer : answer + room], trained=((0, room),))
    first = max(0, answer - room)
    spans = ((max(0, start - first), end - first) for start, end in example.trained if end > first)
    return replace(example, text=example.text[first:], trained=tuple(spans))


def _chunks(examples: Sequence[Example], max_length: int | None) -> Iterator[list[Example]]:
    """The examples in pieces of at most ``CHUNK``, and of about ``CHARACTERS`` where their texts are long."""
    chunk: list[Example] = []
    size = 0
    for example in examples:
        chunk.append(example)
        size += len(_near(example, max_length).text)
        if len(chunk) == CHUNK or size > CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_one(
    example: Example,
    ids: list[int],
    offsets: list[tuple[int, int]],
    *,
    head: int,
    end: int,
    max_length: int | None,
) -> tuple[EncodedRow, bool] | str:
    """Label, end and cut the tokens of one text; its first ``head`` tokens were put there by the tokenizer."""
    # A token that straddles a span's edge counts as inside. Some tokenizers trim a lone space to no width:
    # it belongs to the span in which it ends.
    labels = [
        token if any(last > a and (first < b or last <= b) for a, b in example.trained) else IGNORED
        for token, (first, last) in zip(ids, offsets, strict=True)
    ]
    if all(label == IGNORED for label in labels):
        return "it has no token to train on" if example.text else "it is empty"
    if example.ends:
        ids, labels = [*ids, end], [*labels, end]
    excess = len(ids) - max_length if max_length is not None else 0
    if excess > 0 and example.answer is None:
        ids, labels = ids[:-excess], labels[:-excess]
    elif excess > 0:
        answer = _first_after(offsets, example.trained[-1][0])
        if head + excess > answer - (0 if head else 1):
            return f"max_length {max_length} leaves no room for its answer and a prompt before it"
        ids, labels = ids[:head] + ids[head + excess :], labels[:head] + labels[head + excess :]
    labels[:1] = [IGNORED] * len(labels[:1])
    if all(label == IGNORED for label in labels):
        return f"max_length {max_length} leaves it no token to train on" if excess > 0 else "it is a single token"
    return {"input_ids": ids, "labels": labels}, excess > 0


def _tokenise(texts: list[str], tokenizer: Any) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and character offsets of each text, without the special tokens that the tokenizer adds."""
    try:
        with panics():
            out = tokenizer(
                texts,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                padding=False,
                truncation=False,
                verbose=False,
            )
    except ValueError as error:
        name = tokenizer.name_or_path or "the tokenizer"
        raise DataError(f"{name}: these texts cannot be taken apart ({error}).") from None
    return list(zip(out["input_ids"], out["offset_mapping"], strict=True))


def require_fast(tokenizer: Any) -> None:
    """Raise DataError unless ``tokenizer`` is a fast one, which says where in a text each token is."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer and gives no character offsets, which are needed to find "
            "where an answer begins; use the model's fast tokenizer (the one in its tokenizer.json)."
        )


def _prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text, such as a BOS."""
    require_fast(tokenizer)
    out = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    mask = out["special_tokens_mask"]
    return list(out["input_ids"][: mask.index(0) if 0 in mask else 0])


def _with_prefix(
    ids: list[int], offsets: list[tuple[int, int]], prefix: list[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Put ``prefix`` before the ids, unless they begin with it: the text of a chat template may contain it."""
    if not prefix or ids[: len(prefix)] == prefix:
        return ids, offsets
    return prefix + ids, [(0, 0)] * len(prefix) + offsets


def _first_after(offsets: list[tuple[int, int]], boundary: int) -> int:
    """The index of the first token that ends after ``boundary``; the number of tokens if none does."""
    return next((index for index, (_, last) in enumerate(offsets) if last > boundary), len(offsets))


def _end_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no end-of-sequence token, so a "
            "model could not learn where an answer ends; set tokenizer.eos_token."
        )
    return int(tokenizer.eos_token_id)
