"""The shell of all pages: one template, one style sheet, and how numbers and foreign text get into them.

A page needs nothing but itself: no script, no file beside it, no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from trimtab.errors import printable
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
def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(list(dict.fromkeys([folder, _REPORTS]))),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever a template shows: text from data never acts, and is never a character that cannot be written.
        finalize=lambda value: type(value)(printable(value)) if isinstance(value, str) else value,
    )
    environment.filters.update(
        {form.__name__: form for form in (words.percent, words.small_percent, words.count, words.counted)},
        **{form.__name__: form for form in (words.duration, words.listing, words.number)},
        **{form.__name__: form for form in (words.headed, words.options, words.shorten)},
        date=words.date,
        glued=lambda text: text.replace(" %", "\u00a0%"),
    )
    environment.globals["zip"] = zip
    environment.globals["style"] = Markup((_REPORTS / "shared" / "page.css").read_text(encoding="utf-8"))
    return environment
