"""The shell of every page: what it forbids, and that text from data stays text."""

from __future__ import annotations

from pathlib import Path

from trimtab.reports.shared.shell import html_table, page, write_page


def test_a_page_may_load_nothing_and_run_nothing() -> None:
    assert "default-src 'none'; style-src 'unsafe-inline'" in page("a page", "<p>text</p>")


def test_text_is_escaped_and_what_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "own.html").write_text(
        '{% extends "shared/shell.html" %}{% block body %}<p>{{ text }}</p>{% endblock %}', encoding="utf-8"
    )
    values = {"title": "<b>", "text": "<i>\x1b[2J \ud800"}
    text = write_page(tmp_path / "page.html", "own.html", values, folder=tmp_path).read_text(encoding="utf-8")
    assert "<title>&lt;b&gt;</title>" in text
    assert "<p>&lt;i&gt;\ufffd[2J \ufffd</p>" in text


def test_a_table_has_words_to_the_left_and_numbers_to_the_right() -> None:
    table = html_table(["name", "value"], [["<a>", "1"], ["b", "2"]], marked=[1])
    assert '<th scope="col">name</th><th scope="col" class="n">value</th>' in table
    assert '<tr><th scope="row">&lt;a&gt;</th><td class="n">1</td></tr>' in table
    assert '<tr class="best"><th scope="row">b</th>' in table
    assert 'class="scroll tall"' in html_table(["name"], [["a"]], tall=True)
