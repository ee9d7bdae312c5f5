"""The shell of all pages: one template, one style sheet, and how numbers and foreign text get into them.

A page needs nothing but itself: no script, no file beside it, no network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from trimtab.files import write_text
from trimtab.reports.shared import words

_REPORTS = Path(__file__).resolve().parents[1]


def write_page(target: Path, template: str, values: Mapping[str, Any], *, folder: Path = _REPORTS) -> Path:
    """Write the page that ``template``, a file below ``folder``, makes of ``values``; return its path."""
    page = _environment(folder).get_template(template).render(values)
    # Half a surrogate pair is a legal JSON string and cannot be written as UTF-8.
    write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


@cache
def _environment(folder: Path = _REPORTS) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(list(dict.fromkeys([folder, _REPORTS]))),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever a template shows: text from data never acts, and is never a character that cannot be written.
        finalize=lambda value: words.clean(value) if isinstance(value, str) else value,
    )
    environment.filters.update(
        {form.__name__: form for form in (words.percent, words.small_percent, words.count, words.number)},
        **{form.__name__: form for form in (words.duration, words.listing, words.options, words.shorten)},
        date=words.date,
        glued=lambda text: text.replace(" %", "\u00a0%"),
    )
    environment.globals["zip"] = zip
    environment.globals["style"] = Markup((_REPORTS / "shared" / "page.css").read_text(encoding="utf-8"))
    return environment


def page(title: str, body: str, style: str = "") -> str:
    """A page that stands alone: ``body`` is HTML, ``title`` plain text, ``style`` what the page adds to ours."""
    values = {"title": title, "body": Markup(body), "more_style": Markup(style)}
    return _environment().get_template("shared/free.html").render(values)


def html_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: Collection[int] = (0,),
    tall: bool = False,
    marked: Collection[int] = (),
) -> Markup:
    """A table as HTML, for a page whose body is no template.

    Args:
        heads: the columns' titles, plain text.
        rows: as many cells each, plain text; the first one names the row.
        words: numbers of the columns that hold words; the others hold numbers.
        tall: give it a height of its own, for many rows.
        marked: numbers of the rows that stand out.
    """
    macro = _environment().get_template("shared/parts.html").module.table  # type: ignore[attr-defined]
    return Markup(macro(heads, rows, words=words, tall=tall, marked=marked))
