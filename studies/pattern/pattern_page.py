"""The pattern study on one page: dM over dD for each method, their correlations beside the paper's, and what these
depend on. Reads ``pattern.json`` and ``pattern.csv``."""

from __future__ import annotations

import csv
import html
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pattern_pictures import (
    PAPER,
    VIEW_WORDS,
    draw_changes,
    draw_levels,
    draw_sizes,
    draw_views,
    kinds_of,
    lines_of,
    signed,
    with_interval,
)
from trimtab.config.yaml_text import write_yaml
from trimtab.files import read_json, write_text
from trimtab.reports.shared.figures import write_picture
from trimtab.reports.shared.shell import html_table, page

_SHORT = ("all", "layers", "time")
"""The views that the terminal has room for."""


def verdict(row: Mapping[str, Any]) -> str:
    """Whether the sign of a correlation is the paper's, as far as its interval says."""
    paper = PAPER.get(row["arm"])
    if row["low"] is None:
        return "one seed: no interval"
    if row["low"] <= 0 <= row["high"]:
        return "undecided: 0 is inside"
    if paper is None:
        return "positive" if row["low"] > 0 else "negative"
    return "the paper's sign" if (row["low"] > 0) == (paper > 0) else "the other sign"


def pattern_table(study: Mapping[str, Any]) -> Table:
    """One line for each level, method and kind of projection."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("level", "method", "kind"):
        table.add_column(name)
    for name in (*(VIEW_WORDS[view] for view in _SHORT), "seeds"):
        table.add_column(name, justify="right")
    for level, arm, kind, rows in _grouped(study):
        table.add_row(
            level, arm, kind or "together", *(with_interval(rows[view]) for view in _SHORT),
            str(len(rows["all"]["per_seed"])),
        )  # fmt: skip
    return table


def _grouped(study: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None, dict[str, Mapping[str, Any]]]]:
    """Level, method, kind of projection, and view -> correlation."""
    groups: dict[tuple[str, str, str | None], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in study["correlations"]:
        groups[row["level"], row["arm"], row["kind"]][row["view"]] = row
    for (level, arm, kind), rows in groups.items():
        yield level, arm, kind, rows


def write_pattern_page(folder: Path) -> Path:
    """Write ``pattern.html`` and its pictures, as PNG and SVG, beside the study's ``pattern.json`` and
    ``pattern.csv``."""
    study = read_json(folder / "pattern.json")
    with (folder / "pattern.csv").open(encoding="utf-8", newline="") as file:
        points = list(csv.DictReader(file))
    pictures = {
        "changes": write_picture(
            draw_changes(study, points), folder, "pattern", "dM over dD of every weight, a panel for each method"
        ),
        "sizes": write_picture(
            draw_sizes(study, points), folder, "pattern-sizes", "dD of every weight over the norm of its rows"
        ),
        "views": write_picture(
            draw_views(study), folder, "pattern-views", "correlation of dM and dD by method, in three views"
        ),
    }
    if len({row["level"] for row in study["correlations"]}) > 1:
        for view in ("all", "layers"):
            picture = draw_levels(study, view)
            label = f"correlation {VIEW_WORDS[view]} by method and changed setting"
            pictures[f"levels-{view}"] = write_picture(picture, folder, f"pattern-levels-{view}", label)
    write_text(folder / "pattern.html", _page(study, points, pictures))
    return folder / "pattern.html"


def _page(study: Mapping[str, Any], points: Sequence[Mapping[str, str]], pictures: Mapping[str, str]) -> str:
    level, seed = points[0]["level"], points[0]["seed"]
    seeds = sorted({row["seed"] for row in study["cells"]})
    hours = sum(row["total_seconds"] for row in study["cells"]) / 3600
    model = study["study"]["base"]["model"]
    model = model if isinstance(model, str) else model["name"]
    dependence = ""
    if "levels-all" in pictures:
        dependence = f"""<section><h2>What the correlation depends on</h2>
<p>One setting changed at a time. Over layers and checkpoints:</p>{pictures["levels-all"]}
<p>Between layers:</p>{pictures["levels-layers"]}</section>"""
    body = f"""<h1>Do magnitude and direction of a weight change together?</h1>
<p class="about"><span>{html.escape(str(model))}</span><span>{len(study["cells"])} runs</span><span>seeds
{", ".join(map(str, seeds))}</span><span>{hours:.1f} hours of running</span></p>
<section><h2>One mark is one weight at one checkpoint</h2>
<p>dM = mean |m<sub>t</sub> - m<sub>0</sub>|, dD = mean (1 - cos(V<sub>t</sub>, W<sub>0</sub>)), over the rows of a
weight (DoRA, arXiv 2402.09353, section 3.2 and Figure 2). The marks are those of seed {html.escape(seed)}; the number
above a panel is the correlation over all seeds, with its interval.</p>{pictures["changes"]}</section>
<section><h2>The correlations, and the paper's</h2>
<p>The paper correlates over layers and checkpoints at once. That mixes two things: as training goes on both numbers
grow from zero (<em>over time</em>: each layer's mean taken off), and at any moment some layers have moved more than
others (<em>between layers</em>: each checkpoint's mean taken off). <em>Of ranks</em> is Spearman's correlation, in
which no single weight decides; in <em>dM relative to the norm</em>, dM is a share of the weight's own size, as dD
is.</p>{pictures["views"]}
{_verdicts(study, level)}</section>
<section><h2>What decides dD of a layer</h2>
<p>If every weight is moved equally far, as AdamW tends to do, a weight of half the norm turns four times as much. The
line is that rule. Correlation of dD with 1 / norm<sup>2</sup>: {_sizes(study, level)}.</p>{pictures["sizes"]}</section>
{dependence}
<section><h2>All numbers</h2>{_numbers(study)}
<p class="fine">Intervals: 95 %, a t-interval over the seeds of Fisher's z = atanh r, turned back, since a correlation
near 1 can err to one side only. They speak of other seeds (order of rows, initial values) of this model and task, not
of other models. The points behind one correlation are not independent: neighbouring blocks and checkpoints resemble
each other.</p></section>
<section><h2>What was run</h2>{_cells(study)}
<details><summary>The study's settings, as its YAML says them</summary>
<pre class="wrapped">{html.escape(write_yaml(study["study"]))}</pre></details></section>
"""
    return page("Pattern: magnitude and direction", body, "\n.picture { margin: 1rem 0; }")


def _sizes(study: Mapping[str, Any], level: str) -> str:
    rows = [row for row in lines_of(study, level=level, view="size") if row["kind"] is not None]
    return "; ".join(f"{html.escape(row['arm'])}, {html.escape(row['kind'])} {with_interval(row)}" for row in rows)


def _verdicts(study: Mapping[str, Any], level: str) -> str:
    heads = ["method", "projection", "paper", "layers and checkpoints", "sign", "between layers", "sign"]
    lines = [
        [
            *(row["arm"], row["kind"] or "together", signed(PAPER.get(row["arm"]))),
            *(with_interval(row), verdict(row), with_interval(between), verdict(between)),
        ]
        for row in lines_of(study, level=level, view="all")
        for between in lines_of(study, level=level, view="layers", arm=row["arm"], kind=row["kind"])
    ]
    return html_table(heads, lines, words=(0, 1, 4, 6))


def _numbers(study: Mapping[str, Any]) -> str:
    lines = [
        [level, arm, kind or "together"]
        + [with_interval(rows[view]) for view in VIEW_WORDS]
        + [str(len(rows["all"]["per_seed"]))]
        for level, arm, kind, rows in _grouped(study)
    ]
    heads = ["level", "method", "projection", *VIEW_WORDS.values(), "seeds"]
    return html_table(heads, lines, words=range(3), tall=True)


def _cells(study: Mapping[str, Any]) -> str:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in study["cells"]:
        groups[row["level"], row["arm"]].append(row)
    last = {(row["level"], row["arm"], row["kind"]): row for row in study["changes"]}
    kinds = kinds_of(study)
    lines = []
    for (level, arm), rows in groups.items():
        moved = [
            f"{last[level, arm, kind][key]:.2g}" if (level, arm, kind) in last else ""
            for kind in kinds
            for key in ("delta_magnitude", "delta_direction")
        ]
        trained = [f"{rows[0]['trainable_parameters']:,}", str(rows[0]["steps"])]
        losses = [f"{_mean(rows, key):.3f}" for key in ("first_loss", "last_loss")]
        lines.append([level, arm, *trained, *losses, *moved, f"{_mean(rows, 'total_seconds'):.0f}"])
    moves = [f"{what}, {kind}" for kind in kinds for what in ("dM", "dD")]
    heads = ["level", "method", "trained", "steps", "loss, first", "last", *moves, "seconds"]
    about = (
        '<p class="fine">Means over the seeds. Loss: of the first line of metrics, and over the last quarter of them. '
        "dM and dD: means over the layers at the last checkpoint.</p>"
    )
    return about + html_table(heads, lines, words=(0, 1), tall=True)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))
