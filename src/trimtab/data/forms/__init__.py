"""The forms of rows. One file is one form, and the file's name is the form's name in a configuration.

`_form.py` says what a form has to define. A new file in this folder is found by itself. All rows of a file have the
same form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from trimtab import listing
from trimtab.data.forms._form import Form, keys_of
from trimtab.data.forms._messages import read_weight
from trimtab.data.forms._reading import Reading
from trimtab.data.rows import Example, Row, Source
from trimtab.data.sources import rows_of
from trimtab.errors import DataError, did_you_mean
from trimtab.notes import Notes

__all__ = ["Form", "Reading", "find", "names", "read_examples"]


def names() -> list[str]:
    """The names of all forms, sorted."""
    return listing.names(__path__)


@cache
def find(name: str) -> Form:
    """The form of that name. Raises DataError, which names the nearest, if there is none."""
    if name not in names():
        known = ["auto", *names()]
        raise DataError(
            f"Data form '{name}' is not known; expected one of {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return listing.class_in(__name__, name, Form)()  # type: ignore[type-abstract]


def read_examples(
    source: str | Source | Sequence[str | Source],
    tokenizer: Any,
    *,
    root: Path,
    form: str = "auto",
    notes: Notes | None = None,
) -> list[Example]:
    """Read one source of rows (see ``sources.read_rows``), or a list of them one after the other.

    Args:
        source: one or several. Each file has a form of its own.
        tokenizer: a transformers tokenizer; forms with a chat template use it, and all know its end tokens by it.
        root: the folder that relative paths start from.
        form: for sources that name none: the name of a form, or ``"auto"`` to recognise it by the keys of a file's
            first row.
        notes: is given what the user should know of the rows: what is not used, or not as it stands.

    Raises DataError if a source cannot be read, or a row does not fit its form; the message names file and row.
    """
    named = [source] if isinstance(source, str | Source) else source
    if not named:
        raise DataError("The list of data files is empty; name at least one file or hub dataset.")
    examples: list[Example] = []
    with Reading(tokenizer, notes) as reading:
        for entry in (Source(path=one) if isinstance(one, str) and one else one for one in named):
            if isinstance(entry, str):
                raise DataError("The name of a data file is empty; give a path or a hub dataset such as owner/name.")
            wanted = entry.form if entry.form is not None else form
            for _, rows in groupby(rows_of(entry, root=root), key=lambda row: row.source):
                examples += _examples(rows, reading, None if wanted == "auto" else find(wanted), entry)
    if not examples:
        raise DataError(f"No row is left to train on. {' '.join(reading.notes)}")
    return examples


def _examples(rows: Iterator[Row], reading: Reading, form: Form | None, entry: Source) -> Iterator[Example]:
    """The examples of ``rows`` of one file, all of the same ``form``; None: that of the first row, by its keys."""
    named, first = form is not None, None
    for row in rows:
        if first is None:
            _require_known(entry.columns or {}, row)
        form = form or _recognise(row, entry.columns or {})
        if first is None:
            first = row
            form.check(reading.tokenizer, row.place)
        elif not named and not entry.columns:
            _require_same_form(row, form, first)
        used = form
        if named and form.name == "chat" and not form.fits(row) and (other := _form_of(row)):
            used, row = other, replace(row, value={**row.value, "messages": other.messages(row, reading)})
        for key, value in row.value.items():
            if not (key in form.known or key in used.known or value is None or value in ("", [], {})):
                reading.unused(f"'{key}'", row.place)
        weight = row.value.get("weight")
        if weight is not None and not read_weight(row.place, "weight", weight):
            reading.tell(row.place, "rows left out, since their weight is 0")
        elif (example := form.example(row, reading)) is not None:
            yield replace(example, form=form.name, entry=entry)


@cache
def _all() -> list[Form]:
    """All forms, in the order in which they are tried."""
    return sorted(map(find, names()), key=lambda form: form.precedence)


def _form_of(row: Row) -> Form | None:
    return next((form for form in _all() if form.fits(row)), None)


def _recognise(row: Row, columns: Mapping[str, str]) -> Form:
    # The keys that the user mapped decide, whatever else the table holds.
    mapped = replace(row, value={key: row.value[key] for key in columns})
    form = (_form_of(mapped) if columns else None) or _form_of(row)
    if form is not None and "completion" in form.keys and isinstance(row.value.get("label"), bool):
        raise DataError(
            f"{row.place}: a completion with a label of true or false is for preference training (KTO), which trimtab "
            "leaves to TRL. To learn the good answers alone, keep the rows whose label is true; to learn all of them, "
            f"say data.form: {form.name}."
        )
    if form is not None:
        return form
    if all(row.value.get(key) is not None for key in ("chosen", "rejected")):
        raise DataError(
            f"{row.place}: a row with chosen and rejected is for preference training, which trimtab leaves to TRL. To "
            "learn the chosen answers alone, say data.columns={completion: chosen}."
        )
    expected = "; ".join(f"{'/'.join(form.keys)} ({form.name})" for form in _all())
    raise DataError(
        f"{row.place}: no known form has these keys: {keys_of(row)}. Expected one of: {expected}. If a column has "
        "another name, say so: data.columns={prompt: its name, completion: its name}."
    )


def _require_known(columns: Mapping[str, str], row: Row) -> None:
    known = sorted({key for form in _all() for key in form.known})
    for key in columns:
        if key not in known:
            raise DataError(
                f"{row.source}: data.columns: no form has a key '{key}'; on the left stands one of ours "
                f"({', '.join(known)}), on the right a column.{did_you_mean(key, known)}"
            )


def _require_same_form(row: Row, form: Form, first: Row) -> None:
    other = _form_of(row)
    if other is not None and other is not form:
        raise DataError(
            f"{row.place}: forms are mixed: this row is of the form {other.name} (keys: {keys_of(row)}), but "
            f"{first.place} is {form.name}. Put the rows of each form into a file of their own, or name the form in "
            "the config."
        )
