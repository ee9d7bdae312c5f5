"""Text that a tokenizer has no token for: the model reads one and the same token in place of all of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trimtab.notes import Notes


def tell_unknown(
    rows: Iterable[tuple[str, Sequence[str], Sequence[int]]], tokenizer: Any, notes: Notes, *, written: bool
) -> None:
    """Note the rows that hold text without a token, such as braces and line breaks for T5.

    Args:
        rows: of each its place, its texts and its tokens.
        written: whether the model learns to write some of these texts.
    """
    name = getattr(tokenizer, "unk_token", None)
    if name is None:  # a reader of pictures, too, has none
        return
    # A token that is not in the vocabulary has no number, and asking for it ends in a recursion.
    unknown = tokenizer.get_vocab().get(name)
    ends = (getattr(tokenizer, f"{end}_token_id", None) for end in ("bos", "eos", "cls", "sep"))
    if unknown is None or unknown in ends:  # GPT-2 has one token for all of these
        return
    first: Sequence[str] | None = None
    found = []
    for place, texts, tokens in rows:
        if unknown in tokens:
            found.append(place)
            first = texts if first is None else first
    if first is None:
        return
    sample = next(filter(None, (_without_token(text, tokenizer, unknown) for text in first)), "")
    example = f", such as {sample!r}," if sample else ""
    cannot = " and cannot write" if written else ""
    what = f"text that the tokenizer has no token for{example} which the model reads as {name}{cannot}"
    advice = "Change the rows, or give such texts tokens of their own (model.add_tokens)"
    for place in found:
        notes.row(place, what, advice)


def _without_token(text: str, tokenizer: Any, unknown: int) -> str:
    """The first part of ``text`` without a token; empty where the tokenizer does not say which part a token is."""
    if not getattr(tokenizer, "is_fast", False):
        return ""
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    parts = (
        text[a:b] for token, (a, b) in zip(out["input_ids"], out["offset_mapping"], strict=True) if token == unknown
    )
    return next(parts, "")[:20]
