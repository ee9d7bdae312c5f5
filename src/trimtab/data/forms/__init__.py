"""The forms of rows. One file is one form, and the file's name is the form's name in a configuration.

`_form.py` says what a form has to define. A new file in this folder is found by itself. All rows of a run have the same
form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from trimtab import listing
from trimtab.data.forms._form import Form, keys_of
from trimtab.data.rows import Example, Row
from trimtab.data.sources import read_rows
from trimtab.errors import DataError, did_you_mean
from trimtab.notes import Notes

__all__ = ["Form", "find", "names", "read_examples"]


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
    source: str | Sequence[str], tokenizer: Any, *, root: Path, form: str = "auto", notes: Notes | None = None
) -> list[Example]:
    """Read a file or a hub dataset (see ``sources.read_rows``), or a list of them one after the other.

    Args:
        source: one or several.
        tokenizer: a transformers tokenizer; only a form with a chat template uses it.
        root: the folder that relative paths start from.
        form: the name of a form, or ``"auto"`` to recognise it by the keys of the first row.
        notes: is given what the user should know of the rows.

    Raises DataError if a source cannot be read, or a row does not fit its form; the message names file and row.
    """
    chosen = None if form == "auto" else find(form)
    sources = [source] if isinstance(source, str) else source
    if not sources:
        raise DataError("The list of data files is empty; name at least one file or hub dataset.")
    examples: list[Example] = []
    first: Row | None = None
    for row in (row for name in sources for row in read_rows(name, root=root)):
        if chosen is None:
            chosen = _recognise(row)
        if first is None:
            first = row
            chosen.check(tokenizer, row.place)
        elif form == "auto":
            _require_same_form(row, chosen, first)
        examples.append(replace(chosen.example(row, tokenizer), form=chosen.name))
    return examples


@cache
def _all() -> list[Form]:
    """All forms, in the order in which they are tried."""
    return sorted(map(find, names()), key=lambda form: form.precedence)


def _form_of(row: Row) -> Form | None:
    """The first form all of whose keys this row has. A null counts as missing: columnar files fill gaps with nulls."""
    present = {key for key, value in row.value.items() if value is not None}
    return next((form for form in _all() if present.issuperset(form.keys)), None)


def _recognise(row: Row) -> Form:
    form = _form_of(row)
    if form is None:
        expected = "; ".join(f"{'/'.join(form.keys)} ({form.name})" for form in _all())
        raise DataError(f"{row.place}: no known form has these keys: {keys_of(row)}. Expected one of: {expected}.")
    return form


def _require_same_form(row: Row, form: Form, first: Row) -> None:
    other = _form_of(row)
    if other is not None and other is not form:
        raise DataError(
            f"{row.place}: forms are mixed: this row is of the form {other.name} (keys: {keys_of(row)}), but "
            f"{first.place} is {form.name}. Put the rows of each form into a file of their own, or name the form in "
            "the config."
        )
