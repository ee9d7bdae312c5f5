"""The pattern study on one page: dM over dD for each method, their correlations beside the paper's, and what these
depend on. Reads ``pattern.json`` and ``pattern.csv``."""

from __future__ import annotations

import csv
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
    with_interval,
)
from trimtab.config.yaml_text import write_yaml
from trimtab.files import read_json
from trimtab.reports.shared.figures import write_picture
from trimtab.reports.shared.shell import write_page
from trimtab.reports.study.weight_changes import signed

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
        table.add_row(level, arm, kind or "together", *(with_interval(rows[view]) for view in _SHORT), _seeds(rows))
    return table


def _grouped(study: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None, dict[str, Mapping[str, Any]]]]:
    """Level, method, kind of projection, and view -> correlation."""
    groups: dict[tuple[str, str, str | None], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in study["correlations"]:
        groups[row["level"], row["arm"], row["kind"]][row["view"]] = row
    for (level, arm, kind), rows in groups.items():
        yield level, arm, kind, rows


def _seeds(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How many seeds a correlation was taken over."""
    return str(len(rows["all"]["per_seed"]))


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
            pictures[f"levels_{view}"] = write_picture(picture, folder, f"pattern-levels-{view}", label)
    level = points[0]["level"]
    model = study["study"]["base"]["model"]
    kinds = kinds_of(study)
    values = {
        "study": study,
        "pictures": pictures,
        "model": model if isinstance(model, str) else model["name"],
        "seed": points[0]["seed"],
        "seeds": sorted({row["seed"] for row in study["cells"]}),
        "hours": sum(row["total_seconds"] for row in study["cells"]) / 3600,
        "sizes": [
            f"{row['arm']}, {row['kind']} {with_interval(row)}"
            for row in lines_of(study, level=level, view="size")
            if row["kind"] is not None
        ],
        "verdicts": _verdicts(study, level),
        "views": list(VIEW_WORDS.values()),
        "numbers": [
            [level, arm, kind or "together", *(with_interval(rows[view]) for view in VIEW_WORDS), _seeds(rows)]
            for level, arm, kind, rows in _grouped(study)
        ],
        "moves": [f"{what}, {kind}" for kind in kinds for what in ("dM", "dD")],
        "runs": _runs(study, kinds),
        "yaml": write_yaml(study["study"]),
    }
    return write_page(folder / "pattern.html", "pattern_page.html", values, folder=Path(__file__).parent)


def _verdicts(study: Mapping[str, Any], level: str) -> list[list[str]]:
    """Each correlation over layers and checkpoints and between layers, beside the paper's."""
    return [
        [
            *(row["arm"], row["kind"] or "together", signed(PAPER.get(row["arm"]))),
            *(with_interval(row), verdict(row), with_interval(between), verdict(between)),
        ]
        for row in lines_of(study, level=level, view="all")
        for between in lines_of(study, level=level, view="layers", arm=row["arm"], kind=row["kind"])
    ]


def _runs(study: Mapping[str, Any], kinds: Sequence[str]) -> list[list[str]]:
    """What was trained at each level by each method, means over the seeds; ``kinds``: the projections that are told."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in study["cells"]:
        groups[row["level"], row["arm"]].append(row)
    last = {(row["level"], row["arm"], row["kind"]): row for row in study["changes"]}
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
    return lines


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))
