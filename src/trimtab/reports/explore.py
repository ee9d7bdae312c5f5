"""A search over plans as a table for the terminal and as a page: what was tried, what the best plans share, and whether
the best one holds with new seeds. Everything is read from ``explore.json``."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.files import read_json, write_text
from trimtab.reports import words
from trimtab.reports.explore_plots import draw_confirmed, draw_shared, draw_trials
from trimtab.reports.explore_words import (
    best_quarter,
    confirmation_words,
    numbered,
    own_runs,
    part_words,
    plan_words,
    score_words,
)
from trimtab.reports.html_table import html_table
from trimtab.reports.pictures import page, write_picture

Row = Mapping[str, Any]


def write_explore_page(folder: Path) -> Path:
    """Write ``explore.html`` and its pictures (PNG, SVG) beside the ``explore.json`` in ``folder``."""
    found = read_json(folder / "explore.json")
    shown = [("trials", draw_trials(found), "Score of each run, with the uniform plans as lines")]
    if best_quarter(found):
        shown.append(("shared", draw_shared(found), "How often each group has each method among the best mixed plans"))
    if found["confirmation"]:
        shown.append(("confirmed", draw_confirmed(found), "Mixed minus uniform for each new seed, and their mean"))
    pictures = {name: write_picture(figure, folder, f"explore_{name}", label) for name, figure, label in shown}
    write_text(folder / "explore.html", _page(found, pictures))
    return folder / "explore.html"


def trials_table(found: Row) -> Table:
    """Every run, the best first, then the pruned and the failed ones."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", justify="right")
    for group in found["groups"]:
        table.add_column(group["name"])
    for name in ("parameters", *(["rate"] if len(found["learning_rates"]) > 1 else []), found["metric"]):
        table.add_column(name, justify="right")
    table.add_column("state")
    for row, cells in _lines(found):
        table.add_row(*cells, style="bold" if row["number"] == found["best"] else "")
    return table


def _lines(found: Row) -> list[tuple[Row, list[str]]]:
    """The rows of the table, the same for the terminal and the page."""
    sign = 1 if found["metric"] == "loss" else -1
    order = {row["number"]: place for place, row in enumerate(own_runs(found), 1)}
    ranked = sorted(
        own_runs(found),
        key=lambda row: (
            ("complete", "pruned", "failed").index(row["state"]),
            sign * row["score"] if row["score"] is not None else 0,
        ),
    )
    lines = []
    for row in ranked:
        parts = [part_words(part) for part in row["parts"]]
        rate = [f"{row['learning_rate']:g}"] if len(found["learning_rates"]) > 1 else []
        state = row["state"] if row["state"] != "complete" else ("uniform" if row["kind"] == "uniform" else "")
        score = score_words(found, row["score"])
        lines.append((row, [str(order[row["number"]]), *parts, words.count(row["parameters"]), *rate, score, state]))
    return lines


def _page(found: Row, pictures: Mapping[str, str]) -> str:
    states = [row["state"] for row in own_runs(found)]
    heads = ["run", *(group["name"] for group in found["groups"]), "parameters"]
    heads += ["rate"] * (len(found["learning_rates"]) > 1) + [found["metric"], "state"]
    lines = _lines(found)
    best_rows = [place for place, (row, _) in enumerate(lines) if row["number"] == found["best"]]
    table = html_table(heads, [cells for _, cells in lines], words=range(len(found["groups"]) + 1), marked=best_rows)
    best, uniform = (numbered(found, found[f"best_{kind}"]) for kind in ("mixed", "uniform"))
    facts = [
        f"{found['runs']} runs: {states.count('complete')} to the end, {states.count('pruned')} pruned, "
        f"{states.count('failed')} failed. Proposals without a run: {found['repeated']} known already, "
        f"{found['unfit']} that could not spend the budget."
    ]
    if best:
        groups = ", ".join(group["name"] for group in found["groups"])
        facts.append(f"Best mixed plan ({groups}): {plan_words(best)}; {words.count(best['parameters'])} parameters.")
    if uniform:
        facts.append(f"Best uniform plan: {plan_words(uniform)}; {words.count(uniform['parameters'])} parameters.")
    sections = [pictures["trials"], *(f"<p>{html.escape(fact)}</p>" for fact in facts)]
    sections.append(
        "<p class=fine>All scores are on the validation rows, by which the search chooses, from one seed. The best of "
        "many scores is picked for being good: expect less of it on new rows or with a new seed.</p>"
    )
    if "confirmed" in pictures:
        sections += [
            "<h2>With new seeds</h2>",
            f"<p>{html.escape(confirmation_words(found).capitalize())}.</p>",
            pictures["confirmed"],
            "<p class=fine>Seeds that no run of the search had, the same for both plans, on the same rows: the "
            "interval is Student's t over the seeds. It does not tell how other rows would differ.</p>",
        ]
    else:
        sections.append("<p class=fine>Not confirmed with new seeds: confirm=5 does that.</p>")
    if "shared" in pictures:
        sections += [
            "<h2>What the best plans share</h2>",
            pictures["shared"],
            "<p class=fine>Dark: many of the best plans. <i>all</i>: the share of every mixed plan that was run. The "
            "sampler proposes more of what has scored well: these counts describe the search, they test nothing.</p>",
        ]
    body = f"""<h1>Which layer wants which method</h1>
<p class="about">{html.escape(found["model"])}, {words.count(found["budget"])} trained parameters at most, of which each
proposal uses at least {100 * found["at_least"]:.0f} %.</p>
{chr(10).join(sections)}
<h2>Runs</h2>
{table}
"""
    return page("Search over plans", body, "\nh2 { margin-top: 2.4rem; } p, .picture { margin-bottom: .7rem; }")
