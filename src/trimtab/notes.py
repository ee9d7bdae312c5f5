"""What a user should know although nothing is wrong: told once for each kind, on the terminal and in the run's records.

notes = Notes()
notes.add("train.warmup is longer than the run")
notes.row("rows.jsonl, line 3", "keys that are not used (topic)", "Name them in data.columns")
list(notes)     # the second: keys that are not used (topic): 1 row in rows.jsonl, line 3. Name them in data.columns
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def rows(count: int) -> str:
    """``1 row``, ``1,200 rows``."""
    return "1 row" if count == 1 else f"{count:,} rows"


class Notes:
    """A collection of sentences, in the order in which each kind first came up.

    Whoever reads or checks something is handed one and adds to it; whoever handed it over tells the user
    (`runs.events.Listener.remark`) and keeps the sentences (``notes`` in ``summary.json``).
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], list[str]] = {}

    def add(self, sentence: str) -> None:
        """A fact about the whole: what it is, and what to do. The same sentence is kept once."""
        self._kinds.setdefault((sentence, ""), [])

    def row(self, place: str, what: str, advice: str = "") -> None:
        """A fact about one row. Rows of one kind, that is with the same ``what`` and ``advice``, become one sentence:
        how many they are, and where the first of them stands.

        Args:
            place: of the row, as `data.rows.Row` and `Example` have it.
            what: what is told of it, so that a number of rows can follow: ``keys that are not used (topic, id)``.
            advice: what to do about it; a sentence without its full stop.
        """
        self._kinds.setdefault((what, advice), []).append(place)

    def __iter__(self) -> Iterator[str]:
        for (what, advice), places in self._kinds.items():
            if not places:
                yield what
                continue
            yield f"{what}: {rows(len(places))}{', the first' if len(places) > 1 else ''} in {places[0]}" + (
                f". {advice}" if advice else ""
            )

    @contextmanager
    def told(self, tell: Callable[[str], None]) -> Iterator[None]:
        """While open, facts are gathered; at the end ``tell`` gets each sentence, also if an error ended it: what was
        noticed on the way may explain it."""
        try:
            yield
        finally:
            for sentence in self:
                tell(sentence)
