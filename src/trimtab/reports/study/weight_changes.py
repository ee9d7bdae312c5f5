"""An analysis as a table for the terminal, and as the paper's picture: dD across, dM up (DoRA, Figure 2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from trimtab.files import read_json
from trimtab.reports.shared.figures import MUTED, PAGE, blank, headed, plain, write_picture
from trimtab.reports.shared.shell import write_page

MARKS = "osD^vP*X<>"
# Dark to light on white, and no hue that grey would not keep apart.
_DEPTH = matplotlib.colormaps["viridis"].with_extremes()


def changes_table(analysis: Mapping[str, Any]) -> Table:
    """One line for each folder (where there are several), state and kind of projection: means over its weights."""
    names = _names(analysis)
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in analysis["changes"]:
        groups[names[row["tuned"]], row["state"], row["method"], row["kind"]].append(row)
    first = 0 if len({key[0] for key in groups}) > 1 else 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tuned", "state", "method", "kind")[first:]:
        table.add_column(name, no_wrap=True)
    for name in ("weights", "dM", "dD", "|dW|/|W|", "eff. rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, rows in groups.items():
        ranks = [row["effective_rank"] for row in rows]
        means = (f"{_mean(rows, name):.3g}" for name in ("delta_magnitude", "delta_direction", "relative"))
        table.add_row(*key[first:], str(len(rows)), *means, "" if None in ranks else f"{sum(ranks) / len(ranks):.1f}")
    return table


def correlations_table(analysis: Mapping[str, Any]) -> Table:
    """The correlation of dM and dD of each folder and method, over all weights and states."""
    names = _names(analysis)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tuned", "method", "points", "correlation of dM and dD"):
        table.add_column(name, justify="left" if name in ("tuned", "method") else "right")
    for row in analysis["correlations"]:
        if row["kind"] is None:
            table.add_row(names[row["tuned"]], row["method"], str(row["points"]), signed(row["correlation"]))
    return table


def _names(analysis: Mapping[str, Any]) -> dict[str, str]:
    """Each folder that was analysed by as many of its last parts as tell it from the others: two runs of one name are
    two."""
    parts = {row["tuned"]: Path(row["tuned"]).parts or (row["tuned"],) for row in analysis["changes"]}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {folder: str(Path(*each[-count:])) for folder, each in parts.items()}
        if len({*names.values()}) == len(names):
            return names
    return {folder: folder for folder in parts}


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def scatter_changes(
    axes: Axes, rows: Sequence[Mapping[str, Any]], depth: Normalize, *, mark: str, size: float, label: str
) -> None:
    """dM over dD of ``rows``, whose numbers may be text as a CSV has them, in the colours of ``depth``."""
    axes.scatter(
        [float(row["delta_direction"]) for row in rows],
        [float(row["delta_magnitude"]) for row in rows],
        c=[depth(int(row["block"] or 0)) for row in rows],
        cmap=_DEPTH,
        vmin=0,
        vmax=1,
        marker=mark,
        s=size,
        linewidths=0.4,
        edgecolors=PAGE,
        label=label,
    )


def depth_bar(figure: Figure, depth: Normalize, panels: Any, aspect: float) -> None:
    """What the colours of ``scatter_changes`` mean, beside ``panels``."""
    bar = figure.colorbar(
        ScalarMappable(depth, _DEPTH), ax=panels, pad=0.01, aspect=aspect, ticks=MaxNLocator(integer=True)
    )
    if bar.solids is not None:  # as an image, it would be refused by the security policy of a page
        bar.solids.set(rasterized=False, edgecolor="face")
    bar.set_label("block, first to last", fontsize=9, color=MUTED)
    bar.ax.tick_params(labelsize=8, colors=MUTED)


def draw(analysis: Mapping[str, Any]) -> Figure:
    """A panel for each folder and method; a mark for each state, a colour for the depth of the block."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in analysis["changes"]:
        groups[row["tuned"], row["method"]].append(row)
    correlations = {(row["tuned"], row["method"]): row for row in analysis["correlations"] if row["kind"] is None}
    names = _names(analysis)
    blocks = [row["block"] for row in analysis["changes"] if row["block"] is not None]
    depth = Normalize(min(blocks, default=0), max(blocks, default=1))
    figure = blank(4.4 * len(groups) + 0.9, 4.4)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (key, rows) in zip(panels, groups.items(), strict=True):
        states = list(dict.fromkeys(row["state"] for row in rows))
        for place, state in enumerate(states):
            mine = [row for row in rows if row["state"] == state]
            scatter_changes(axes, mine, depth, mark=MARKS[place % len(MARKS)], size=26, label=state)
        correlation = signed(correlations[key]["correlation"])
        headed(axes, f"{names[key[0]]}, {key[1]}: correlation {correlation}", bold=False)
        axes.set_xlabel("dD: mean of 1 - cosine over the rows")
        axes.set_ylabel("dM: mean change of magnitude")
        plain(axes)
        axes.ticklabel_format(style="sci", scilimits=(-3, 3))
        if len(states) > 1:
            axes.legend(fontsize=7, frameon=False, loc="best")
    if blocks:
        depth_bar(figure, depth, panels, aspect=30)
    return figure


def write_changes_page(folder: Path) -> Path:
    """Write ``changes.png``, ``changes.svg`` and ``changes.html`` beside the ``changes.json`` in ``folder``."""
    analysis = read_json(folder / "changes.json")
    names = _names(analysis)
    values = {
        "base": analysis["base"],
        "picture": write_picture(draw(analysis), folder, "changes", "dM over dD of every weight"),
        "correlations": [
            [names[row["tuned"]], row["method"], row["kind"] or "all", row["points"], signed(row["correlation"])]
            for row in analysis["correlations"]
        ],
    }
    return write_page(folder / "changes.html", "study/weight_changes.html", values)
