"""Rows shown as the model will see them, with the part that carries loss marked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trimtab.data.rows import Example
from trimtab.data.tokens import IGNORED, Encoded, EncodedRows, encode

LONGEST = 1500
"""Characters of one part that are shown; of a longer one, the middle is left out."""


@dataclass(frozen=True)
class Shown:
    """One row: a heading, and its text in parts, each with whether it carries loss."""

    heading: str
    parts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Preview:
    """Rows to print.

    ``str`` gives plain text with ``[[...]]`` around what carries loss, and so does a rich console that writes to a file
    or a pipe; on a terminal with colours that part is bold, underlined and green instead.
    """

    rows: tuple[Shown, ...]

    def __str__(self) -> str:
        return "\n\n".join(
            row.heading + "\n" + "".join(f"[[{text}]]" if trained else text for text, trained in row.parts)
            for row in self.rows
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not console.is_terminal or console.color_system is None:
            yield Text(str(self))
            return
        for index, row in enumerate(self.rows):
            text = Text("\n" if index else "")
            text.append(row.heading + "\n", style="dim")
            for part, trained in row.parts:
                text.append(part, style="bold underline green" if trained else "")
            yield text


def preview(rows: Iterable[Example] | Iterable[Encoded] | EncodedRows, tokenizer: Any, count: int = 2) -> Preview:
    """The first ``count`` rows, decoded from their token ids, special tokens and all.

    Args:
        rows: examples (encoded here, at full length), or what ``tokens.encode`` or ``tokens.encode_all`` gave.
        tokenizer: the tokenizer that encodes, or has encoded, them.
        count: how many rows.
    """
    return Preview(tuple(_show(*row, tokenizer) for row in islice(_named(rows, tokenizer), count)))


def _named(rows: Any, tokenizer: Any) -> Iterator[tuple[str, list[int], list[int]]]:
    """The name, ids and labels of each row."""
    for index, row in enumerate(rows):
        if isinstance(rows, EncodedRows):
            source, number = rows.origins[index]
            yield f"{source}, row {number}", row["input_ids"], row["labels"]
        elif isinstance(row, Example):
            encoded = encode(row, tokenizer, None)
            yield f"{row.source}, row {row.number}", encoded.input_ids, encoded.labels
        else:
            yield f"row {index + 1}", row.input_ids, row.labels


def _show(name: str, ids: list[int], labels: list[int], tokenizer: Any) -> Shown:
    trained = sum(label != IGNORED for label in labels)
    return Shown(f"{name}: {len(ids)} tokens, {trained} trained", tuple(_parts(ids, labels, tokenizer)))


def _parts(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Runs of tokens that carry loss or do not, as text."""
    start = 0
    before = ""
    for at in range(1, len(ids) + 1):
        if at < len(ids) and (labels[at] != IGNORED) == (labels[start] != IGNORED):
            continue
        # The text up to here, less the text before: decoded alone, a run could lose the space before its first word.
        through = tokenizer.decode(list(ids[:at]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield _printable(_abridged(through[len(before) :])), labels[start] != IGNORED
        start, before = at, through


def _abridged(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _printable(text: str) -> str:
    """Control characters by name: a row must not move the cursor or colour the terminal."""
    shown = (char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return "".join(shown)
