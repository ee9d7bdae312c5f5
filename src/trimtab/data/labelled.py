"""Rows that a head of its own answers: a text, its tokens or a picture, each with what it is labelled with.

They are read by their keys. Another column is named by ``data.columns``, such as ``{text: sentence, label: gold}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trimtab.data.forms._form import keys_of
from trimtab.data.forms._messages import read_weight
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Row, Source
from trimtab.data.sources import rows_of
from trimtab.errors import DataError, did_you_mean
from trimtab.models.locate import ModelHead
from trimtab.notes import Notes


@dataclass(frozen=True)
class Labelled:
    """One row, and its label.

    Attributes:
        source, number: as in `Row`.
        label: a name, several of them, or a number.
        text: what is classified; ``pair``: the second text of two.
        words: of a text whose words are labelled one by one.
        image: the file of a picture; ``named``: as the row names it; ``content``: its bytes, where the row holds them.
        form: the keys that were used.
        entry: what the configuration says of where the row comes from.
    """

    source: str
    number: int
    label: str | tuple[str, ...] | float
    text: str = ""
    pair: str | None = None
    words: tuple[str, ...] = ()
    image: str = ""
    named: str = ""
    content: bytes = b""
    form: str = ""
    entry: Source | None = field(default=None, compare=False)

    @property
    def place(self) -> str:
        """Where the row stands, for a message."""
        return f"{self.source}, row {self.number}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Its labels, however many; none where it is labelled with a number."""
        return self.label if isinstance(self.label, tuple) else (self.label,) if isinstance(self.label, str) else ()

    @property
    def answer(self) -> str:
        """The label in words."""
        return f"{self.label:.9g}" if isinstance(self.label, float) else (" " if self.words else ", ").join(self.labels)

    @property
    def prompt(self) -> str:
        """What is labelled, in words."""
        shown = self.text or " ".join(self.words) or self.image
        return shown if self.pair is None else f"{shown}\n{self.pair}"


Make = Callable[[Row], Labelled]
"""Makes the row of a task of what was read. Raises DataError, which names the row."""


def read_labelled(
    sources: Sequence[Source], make: Make, *, keys: Sequence[str], root: Path, notes: Notes | None = None
) -> list[Labelled]:
    """Read ``sources`` one after the other.

    Args:
        make: makes a row of the task.
        keys: those that it may use; ``notes`` are told of others.
        root: the folder that relative paths start from.

    Raises DataError if a source cannot be read, or if a row is not what the task takes.
    """
    found = []
    with Reading(None, notes) as reading:
        for entry in sources:
            for key in entry.columns or {}:
                if key not in keys:
                    raise DataError(
                        f"{entry.path}: data.columns: this task has no key '{key}'; on the left stands one of "
                        f"{', '.join(keys)}, on the right a column.{did_you_mean(key, keys)}"
                    )
            for row in rows_of(entry, root=root):
                for key, value in row.value.items():
                    if not (key in keys or key == "weight" or value is None or value in ("", [], {})):
                        reading.unused(f"'{key}'", row.place)
                weight = row.value.get("weight")
                if weight is not None and not read_weight(row.place, "weight", weight):
                    reading.tell(row.place, "rows left out, since their weight is 0")
                else:
                    found.append(replace(make(row), entry=entry))
    if not found:
        raise DataError("No row is left: all have the weight 0.")
    return found


def labelled_as(head: ModelHead, rows: Sequence[Labelled], *, numbered: bool) -> list[Labelled]:
    """``rows`` with labels as ``head`` tells them apart: one, or several.

    ``numbered``: whether whole numbers may stand for its labels in their order, as data sets on the hub have them.

    Raises DataError, which names the row, for a label that it does not know.
    """
    return [_labelled_as(head, row, numbered) for row in rows] if head.labels else list(rows)


def _labelled_as(head: ModelHead, row: Labelled, numbered: bool) -> Labelled:
    known = head.labels
    labels = called(row, known).labels if numbered else row.labels
    if strange := [label for label in labels if label not in known]:
        raise DataError(
            f"{row.place}: the model does not know the label '{strange[0]}'; its labels are {', '.join(known[:20])}"
            f"{', ...' if len(known) > 20 else ''} (upper and lower case differ)."
        )
    if row.words or head.problem == "multi_label_classification":
        return replace(row, label=labels)
    if len(labels) != 1:
        raise DataError(
            f"{row.place}: the model gives one label to each row, and this one has {len(labels) or 'none'}. Of a model "
            "that gives several, the config.json says problem_type: multi_label_classification."
        )
    return replace(row, label=labels[0])


def called(row: Labelled, names: Sequence[str]) -> Labelled:
    """``row`` with a label that is a whole number called by its name: data sets on the hub number their labels, and
    name them in their order elsewhere. Where ``names`` are numbers themselves, nothing is known of an order."""
    if isinstance(row.label, float) or any(map(is_whole, names)):
        return row
    by_number = {str(number): name for number, name in enumerate(names)}
    labels = tuple(by_number.get(label, label) for label in row.labels)
    return replace(row, label=labels if isinstance(row.label, tuple) else labels[0])


_ANSWERS = ("label", "labels", "target", "id")
"""Columns that are texts now and then, and never what is classified."""


def text_of(row: Row, key: str = "text") -> str:
    """The text under ``key``. Raises DataError if it is none."""
    value = row.value.get(key)
    if isinstance(value, str):
        return value
    if value is None:
        texts = [str(name) for name, held in row.value.items() if isinstance(held, str) and name not in _ANSWERS]
        meant = texts[0] if len(texts) == 1 else "its name"
        pair = f"; for a pair of texts {{text: {texts[0]}, text_pair: {texts[1]}}}" if len(texts) == 2 else ""
        raise DataError(
            f"{row.place}: expected a text under '{key}', but its keys are {keys_of(row)}. If the column has another "
            f"name, say so: data.columns={{{key}: {meant}}}{pair}."
        )
    raise DataError(f"{row.place}: expected a text under '{key}', got {type(value).__name__}.")


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

LARGEST = 1e15
"""Larger numbers have squares that float32 cannot hold."""


def number_of(value: object, place: str) -> float:
    """A label that is a number, or a text that is one. Raises DataError for anything else."""
    said = value.strip() if isinstance(value, str) else value
    if isinstance(said, str) and _NUMBER.fullmatch(said):
        said = float(said)
    if isinstance(said, bool) or not isinstance(said, int | float):
        shown = "nothing" if said is None or said == "" else f"{value!r}"[:60]
        hint = " A decimal point is a point, and thousands have none." if isinstance(said, str) and "," in said else ""
        raise DataError(f"{place}: expected a number under 'label', got {shown}.{hint}")
    if not abs(said) <= LARGEST:  # NaN, too
        raise DataError(f"{place}: expected a number of at most {LARGEST:g} under 'label', got {said!r:.60}.")
    return float(said)


def is_whole(label: str) -> bool:
    """Whether the name of a label is a whole number."""
    return label.removeprefix("-").isdecimal()


def is_broken(value: object) -> bool:
    """Whether a label is a number that is not whole, or a text that is one."""
    try:
        return value is not None and not number_of(value, "").is_integer()
    except DataError:
        return False


_NO_LABEL = -100
"""What stands in place of a label in rows that transformers' own examples have tokenised."""


def name_of_label(value: object, place: str, key: str = "label") -> str:
    """A label as it is called: a word, or a number as it is written. Raises DataError for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value in (_NO_LABEL, str(_NO_LABEL)):
        raise DataError(
            f"{place}: {_NO_LABEL} under '{key}' marks what has no label in rows that are tokenised already; give the "
            "words or the text as they were, with the labels of those"
        )
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    if value is None or value == "":
        raise DataError(
            f"{place}: expected a label under '{key}', a word or a whole number, got nothing. If the column has "
            f"another name, say so: data.columns={{{key}: its name}}."
        )
    hint = " For numbers say task: regression." if isinstance(value, float) and value == value else ""
    said = f"{value!r}"[:60]
    raise DataError(f"{place}: expected a label under '{key}', a word or a whole number, got {said}.{hint}")
