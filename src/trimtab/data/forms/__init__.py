"""The forms of rows. One file is one form, and the file's name is the form's name in a configuration.

`_form.py` says what a form has to define. A new file in this folder is found by itself. All rows of a file have
the same form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from trimtab import listing
from trimtab.data.forms._form import Form, keys_of
from trimtab.data.rows import Example, Row, Source
from trimtab.data.sources import rows_of
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
        tokenizer: a transformers tokenizer; only a form with a chat template uses it.
        root: the folder that relative paths start from.
        form: for sources that name none: the name of a form, or ``"auto"`` to recognise it by the keys of a file's
            first row.
        notes: is given what the user should know of the rows.

    Raises DataError if a source cannot be read, or a row does not fit its form; the message names file and row.
    """
    named = [source] if isinstance(source, str | Source) else source
    if not named:
        raise DataError("The list of data files is empty; name at least one file or hub dataset.")
    examples: list[Example] = []
    for entry in (Source(path=one) if isinstance(one, str) and one else one for one in named):
        if isinstance(entry, str):
            raise DataError("The name of a data file is empty; give a path or a hub dataset such as owner/name.")
        wanted = entry.form if entry.form is not None else form
        file, first = "", None
        for row in rows_of(entry, root=root):
            if row.source != file:
                file, first = row.source, None
            if first is None:
                first = row
                chosen = _recognise(row, entry.columns or {}) if wanted == "auto" else find(wanted)
                chosen.check(tokenizer, row.place)
            elif wanted == "auto" and not entry.columns:
                _require_same_form(row, chosen, first)
            examples.append(replace(chosen.example(row, tokenizer), form=chosen.name, entry=entry))
    return examples


@cache
def _all() -> list[Form]:
    """All forms, in the order in which they are tried."""
    return sorted(map(find, names()), key=lambda form: form.precedence)


def _form_of(row: Row) -> Form | None:
    """The first form all of whose keys this row has. A null counts as missing: columnar files fill gaps with nulls."""
    present = {key for key, value in row.value.items() if value is not None}
    return next((form for form in _all() if present.issuperset(form.keys)), None)


def _recognise(row: Row, columns: Mapping[str, str]) -> Form:
    # The keys that the user mapped decide, whatever else the table holds.
    form = next((form for form in _all() if columns and columns.keys() >= set(form.keys)), None) or _form_of(row)
    if form is None:
        expected = "; ".join(f"{'/'.join(form.keys)} ({form.name})" for form in _all())
        raise DataError(
            f"{row.place}: no known form has these keys: {keys_of(row)}. Expected one of: {expected}. If a column has "
            "another name, say so: data.columns={prompt: its name, completion: its name}."
        )
    return form


def _require_same_form(row: Row, form: Form, first: Row) -> None:
    other = _form_of(row)
    if other is not None and other is not form:
        raise DataError(
            f"{row.place}: forms are mixed: this row is of the form {other.name} (keys: {keys_of(row)}), but "
            f"{first.place} is {form.name}. Put the rows of each form into a file of their own, or name the form in "
            "the config."
        )
