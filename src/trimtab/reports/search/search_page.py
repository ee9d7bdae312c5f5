"""``explore.html``: a search over plans as a page, from its ``explore.json`` alone: what was tried, what the best plans
share, and whether the best one holds with new seeds."""

from __future__ import annotations

from pathlib import Path

from trimtab.reports.search.search_pictures import draw_confirmed, draw_shared, draw_trials
from trimtab.reports.search.search_words import (
    best_quarter,
    confirmation_words,
    heads,
    own_runs,
    plan_words,
    ranked_cells,
)
from trimtab.reports.shared import words
from trimtab.reports.shared.figures import write_picture
from trimtab.reports.shared.shell import write_page
from trimtab.runs.read import read_search_results


def write_explore_page(folder: Path) -> Path:
    """Write ``explore.html`` and its pictures (PNG, SVG) beside the ``explore.json`` in ``folder``."""
    search = read_search_results(folder)
    shown = [("trials", draw_trials, "Score of each run, with the uniform plans as lines")]
    if best_quarter(search):
        shown.append(("shared", draw_shared, "How often each group has each method among the best mixed plans"))
    if search.confirmation:
        shown.append(("confirmed", draw_confirmed, "Mixed minus uniform for each new seed, and their mean"))
    states = [row.state for row in own_runs(search)]
    ranked = ranked_cells(search)
    values = {
        "search": search,
        "states": {state: states.count(state) for state in ("complete", "pruned", "failed")},
        "best": [
            (kind, plan_words(row), row.parameters)
            for kind in ("mixed", "uniform")
            if (row := search.numbered(getattr(search, f"best_{kind}")))
        ],
        "confirmation": words.headed(confirmation_words(search)) if search.confirmation else "",
        "heads": heads(search),
        "ranked": [cells for _, cells in ranked],
        "marked": [place for place, (row, _) in enumerate(ranked) if row.number == search.best],
        "pictures": {
            name: write_picture(draw(search), folder, f"explore_{name}", label) for name, draw, label in shown
        },
    }
    return write_page(folder / "explore.html", "search/search.html", values)
