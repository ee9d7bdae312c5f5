"""The rows of the study's two tasks, written once into the study's state: nothing of them is part of the repository.

sentiment    the shorter sentences of the Financial PhraseBank in ``../shared/data``, asked for more briefly than there
orders       a note in words is to be written as one line of an order book: made here, with a fixed seed

An order has parts to copy (who, what), to put in another form (the day, the count) and to work out (the sum), so its
loss does not fall to nothing within a short run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from trimtab.errors import DataError
from trimtab.files import write_text

TRAIN_ROWS, VALIDATION_ROWS = 1400, 64
LONGEST = 120
"""Characters: about half of the PhraseBank's sentences are shorter. Short rows make many cells of one evening."""

_NAMES = "Ada Bruno Carla Dario Edith Farid Greta Hugo Ines Jonas Kira Luis Mona Nils Olga Pavel Rosa Samir Tilda Yusuf"
_GOODS = "apples beans candles drills envelopes figs gloves hinges jars kettles lamps mugs nails onions pears ropes"
_NUMBERS = "two three four five six seven eight nine ten eleven twelve"
_MONTHS = "January February March April May June July August September October November December"
_NOTES = (
    "{name} called: {count} {goods} at {price} euros apiece, to be here by the {day} of {month}.",
    "Please put down {count} {goods} for {name}. {price} euros each, wanted on {month} {day}.",
    "By {month} the {day} {name} needs {goods}, {count} of them, and pays {price} euros for one.",
    "{goods} again! {name} takes {count}, one costs {price} euros, fetched on the {day} of {month}.",
)


def write_rows(folder: Path, phrasebank: Path) -> None:
    """Write ``TASK-train.jsonl`` and ``TASK-validation.jsonl`` of both tasks into ``folder``, unless they are there.

    Raises DataError if ``phrasebank``, the training rows of the PhraseBank, is not a file.
    """
    makers: dict[str, Callable[[], list[dict[str, str]]]] = {
        "sentiment": lambda: _sentiment(phrasebank),
        "orders": lambda: list(_orders()),
    }
    for task, rows in makers.items():
        files = [folder / f"{task}-{part}.jsonl" for part in ("train", "validation")]
        if not all(file.is_file() for file in files):
            made = rows()
            for file, part in zip(files, (made[VALIDATION_ROWS:], made[:VALIDATION_ROWS]), strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, "".join(json.dumps(row) + "\n" for row in part))


def _sentiment(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise DataError(f"{file}: the Financial PhraseBank's training rows are not there; name them with phrasebank=")
    rows: dict[str, dict[str, str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        sentence = row["context"].split("Input: ", 1)[1].split("\nAnswer:", 1)[0].strip()
        if len(sentence) <= LONGEST:
            asked = f"{sentence}\nSentiment (negative, neutral or positive):"
            rows[sentence] = {"prompt": asked, "completion": f" {row['target']}"}
    short = list(rows.values())
    random.Random(0).shuffle(short)
    return short[: VALIDATION_ROWS + TRAIN_ROWS]


def _orders() -> Iterator[dict[str, str]]:
    draw = random.Random(0)
    seen: set[str] = set()
    while len(seen) < VALIDATION_ROWS + TRAIN_ROWS:
        name, goods, note = (draw.choice(texts) for texts in (_NAMES.split(), _GOODS.split(), _NOTES))
        count, price, day, month = draw.randint(2, 12), draw.randint(3, 40), draw.randint(1, 28), draw.randint(1, 12)
        words = {"count": _NUMBERS.split()[count - 2], "month": _MONTHS.split()[month - 1], "day": day, "price": price}
        text = note.format(name=name, goods=goods, **words)
        if text not in seen:
            seen.add(text)
            line = f" {name}; {count} {goods}; {day:02d}/{month:02d}; total {count * price}"
            yield {"prompt": f"Note: {text}\nOrder:", "completion": line}
