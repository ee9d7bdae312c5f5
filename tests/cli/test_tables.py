"""Tables on terminals of any width: no figure is cut, and no word."""

from __future__ import annotations

import io
import re

import pytest
from rich.table import Table
from rich.text import Text

from trimtab.cli.displays.console import Terminal

FIGURES = ["+43.41 (+41.19 to +45.63)", "2,439,000", "33.3 %"]


def shown(width: int, table: Table) -> str:
    console = Terminal(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def of_figures(footer: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, title="kind, 200 rows", title_justify="left", show_footer=footer)
    table.add_column("arm", footer="in all")
    table.add_column("outer attention")
    for title in ("above\nLoRA", "parameters", "accuracy"):
        table.add_column(title, justify="right", footer="9 %" if footer else "")
    table.add_row("MoRA with magnitude", "mora 8", *FIGURES)
    table.add_row("full", "", "", Text("0"), "7.0 %")
    return table


@pytest.mark.parametrize("width", [40, 62, 66, 70, 80, 200])
def test_no_figure_and_no_word_is_cut(width: int) -> None:
    said = shown(width, of_figures())
    assert "…" not in said
    assert all(figure in said for figure in FIGURES)
    assert {"magnitude", "attention", "mora"} <= set(re.findall(r"\w+", said))
    assert max(map(len, said.splitlines())) <= width


def test_a_table_without_room_is_told_row_by_row() -> None:
    assert shown(40, of_figures()).split("\n\n") == [
        "kind, 200 rows\narm: MoRA with magnitude\nouter attention: mora 8\nabove LoRA: +43.41 (+41.19 to +45.63)\n"
        "parameters: 2,439,000\naccuracy: 33.3 %",
        "arm: full\nparameters: 0\naccuracy: 7.0 %",
        "",
    ]
    assert (
        shown(40, of_figures(footer=True))
        .rstrip()
        .endswith("arm: in all\nabove LoRA: 9 %\nparameters: 9 %\naccuracy: 9 %")
    )


def test_a_terminal_that_grows_gets_the_whole_table() -> None:
    table = of_figures()
    wide = shown(200, table)
    assert [shown(width, table) for width in (66, 40, 200)][-1] == wide
    assert "arm: full" not in wide


def test_a_name_and_a_value_stay_beside_each_other() -> None:
    table = Table("name", "value")
    table.add_row("perplexity", "a" * 50)
    assert "perplexity:" not in shown(30, table)


def test_the_heading_of_what_is_not_wrapped_is_whole() -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("state", "weights", "eff. rank"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_row("checkpoint-16", "2", "1.7")
    said = shown(24, table)
    assert "eff. rank" in said
    assert "checkpoint-16" in said


def test_what_may_be_cut_and_bars_keep_their_lines() -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("over steps", no_wrap=True, overflow="crop")
    table.add_column("right", justify="right", no_wrap=True)
    table.add_row("MoRA", "#" * 90, "81.2 %")
    assert re.fullmatch(r"MoRA +#{20,} +81.2 %", shown(40, table).splitlines()[1].strip())
    bar = Table.grid(padding=(0, 1))
    bar.add_row("training", "#" * 20, "1/1200", "loss 6.0673  720 tokens/s  0:01 left  0.51 GiB")
    assert shown(40, bar).startswith("training #")
