"""The shell of every page: what it forbids, and that text from data stays text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.reports.shared.shell import write_page

PAGE = """{% extends "shared/shell.html" %}
{% from "shared/parts.html" import table %}
{% block title %}{{ text }}{% endblock %}
{% block body %}<p>{{ text }}</p>
{{ table(["name", "value"], rows, marked=[1], tall=tall) }}{% endblock %}
"""


def page(folder: Path, **values: Any) -> str:
    (folder / "own.html").write_text(PAGE, encoding="utf-8")
    values = {"text": "", "rows": [], "tall": False, **values}
    return write_page(folder / "page.html", "own.html", values, folder=folder).read_text(encoding="utf-8")


def test_a_page_may_load_nothing_and_run_nothing(tmp_path: Path) -> None:
    assert "default-src 'none'; style-src 'unsafe-inline'" in page(tmp_path)


def test_text_is_escaped_and_what_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    text = page(tmp_path, text="<i>\x1b[2J \ud800")
    assert "<title>&lt;i&gt;\\x1b[2J \\ud800</title>" in text
    assert "<p>&lt;i&gt;\\x1b[2J \\ud800</p>" in text


def test_a_table_has_words_to_the_left_and_numbers_to_the_right(tmp_path: Path) -> None:
    rows = [["<a>", "1"], ["b", "2"]]
    text = page(tmp_path, rows=rows)
    assert '<th scope="col">name</th><th scope="col" class="n">value</th>' in text
    assert '<tr><th scope="row">&lt;a&gt;</th><td class="n">1</td></tr>' in text
    assert '<tr class="best"><th scope="row">b</th>' in text
    assert 'class="scroll tall"' not in text
    assert 'class="scroll tall"' in page(tmp_path, rows=rows, tall=True)
