"""Shows rows as the model will see them, with the parts that carry loss marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from trimtab.data.tokens import EncodedRows
from trimtab.errors import printable
from trimtab.models.causal_head import IGNORED

Parts = tuple[tuple[str, bool], ...]
"""Pieces of a text, each with whether it carries loss."""

LONGEST = 1500
"""Most characters of a part that are shown; a longer one loses its middle."""

MOST = 4
"""Most rows that are shown where there are several sources."""


@dataclass(frozen=True)
class Preview:
    """Rows to print.

    ``str`` and a rich console without colours put ``[[...]]`` around what carries loss; on a terminal with colours
    that part is bold, underlined and green instead.
    """

    rows: tuple[tuple[str, Parts], ...]
    """A heading and the parts of the text, for each row."""

    def __str__(self) -> str:
        return "\n\n".join(
            heading + "\n" + "".join(f"[[{text}]]" if trained else text for text, trained in parts)
            for heading, parts in self.rows
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not console.is_terminal or console.color_system is None:
            yield Text(str(self))
            return
        for index, (heading, parts) in enumerate(self.rows):
            text = Text("\n" if index else "")
            text.append(heading + "\n", style="dim")
            for part, trained in parts:
                text.append(part, style="bold underline green" if trained else "")
            yield text


def preview(rows: EncodedRows, tokenizer: Any, count: int = 2) -> Preview:
    """``count`` rows, decoded from their token ids with all special tokens: the first of each source, up to four, then
    those that follow."""
    shown = []
    for index in _worth_showing(rows.origins, count):
        (source, number), row = rows.origins[index], rows[index]
        ids, labels = row["input_ids"], row["labels"]
        trained = sum(label != IGNORED for label in labels)
        heading = f"{source}, row {number}: {len(ids)} tokens, {trained} trained"
        shown.append((heading, tuple(_parts(ids, labels, tokenizer))))
    return Preview(tuple(shown))


def _worth_showing(origins: Sequence[tuple[str, int]], count: int) -> list[int]:
    firsts: dict[str, int] = {}
    for index, (source, _) in enumerate(origins):
        firsts.setdefault(source, index)
    chosen = list(firsts.values())[:MOST]
    for index, origin in enumerate(origins):
        if len(chosen) < count and origin not in {origins[at] for at in chosen}:  # a repeated row is shown once
            chosen.append(index)
    return sorted(chosen)


def _parts(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text of each run of tokens that carry loss, or do not."""
    end, before = 0, ""
    for trained, run in groupby(label != IGNORED for label in labels):
        end += sum(1 for _ in run)
        # The text up to here, less the text before: decoded alone, a run could lose the space before its first word.
        through = tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield printable(_abridged(through[len(before) :])), trained
        before = through


def _abridged(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
