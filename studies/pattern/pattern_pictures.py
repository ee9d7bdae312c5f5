"""The pictures of the pattern study: dM over dD, the correlations, and what these depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from trimtab.reports.shared.figures import INK, LINE, MUTED, blank, plain
from trimtab.reports.study.weight_changes import MARKS, depth_bar, scatter_changes, signed

PAPER = {"full": -0.62, "lora": 0.83, "dora": -0.31}
"""Correlations on VL-BART's query and value matrices (arXiv 2402.09353, section 3.2)."""

VIEW_WORDS = {
    "all": "layers and checkpoints",
    "ranks": "the same, of ranks",
    "relative": "dM relative to the norm",
    "layers": "between layers",
    "time": "over time",
}

_MARKS = MARKS[:8]


def with_interval(row: Mapping[str, Any]) -> str:
    """A correlation and its interval, in words for a table."""
    if row["low"] is None:
        return signed(row["mean"])
    return f"{signed(row['mean'])} [{signed(row['low'])}, {signed(row['high'])}]"


def lines_of(study: Mapping[str, Any], **wanted: Any) -> list[Mapping[str, Any]]:
    """The correlations whose keys have the values ``wanted``."""
    return [row for row in study["correlations"] if all(row[key] == value for key, value in wanted.items())]


def kinds_of(study: Mapping[str, Any]) -> list[str]:
    """The kinds of projection of the first level, which are the study's own; a level may train others."""
    first = lines_of(study, level=study["correlations"][0]["level"])
    return list(dict.fromkeys(row["kind"] for row in first if row["kind"] is not None))


def arms_of(study: Mapping[str, Any], level: str) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in study["correlations"] if row["level"] == level))


def draw_changes(study: Mapping[str, Any], points: Sequence[Mapping[str, str]]) -> Figure:
    """The paper's Figure 2: dD across, dM up; a column for each method, a row for each kind of projection, a mark for
    each checkpoint, a colour for the depth of the block. One seed."""
    level, seed = points[0]["level"], points[0]["seed"]
    mine = [row for row in points if row["level"] == level and row["seed"] == seed]
    arms, kinds = list(dict.fromkeys(row["arm"] for row in mine)), list(dict.fromkeys(row["kind"] for row in mine))
    steps = sorted({int(row["step"]) for row in mine})
    blocks = [int(row["block"]) for row in mine if row["block"]]
    depth = Normalize(min(blocks, default=0), max(blocks, default=1))
    figure = blank(3.5 * len(arms) + 0.9, 3.1 * len(kinds) + 0.4)
    panels = figure.subplots(len(kinds), len(arms), squeeze=False)
    for line, kind in zip(panels, kinds, strict=True):
        for axes, arm in zip(line, arms, strict=True):
            for place, step in enumerate(steps):
                rows = [row for row in mine if (row["arm"], row["kind"], int(row["step"])) == (arm, kind, step)]
                mark = _MARKS[place % len(_MARKS)]
                scatter_changes(axes, rows, depth, mark=mark, size=22, label=f"step {step}")
            (said,) = lines_of(study, level=level, arm=arm, kind=kind, view="all")
            axes.set_title(f"{arm}, {kind}: {with_interval(said)}", fontsize=10, color=INK, loc="left")
            axes.ticklabel_format(style="sci", scilimits=(-3, 3))
            plain(axes)
    for axes in panels[-1]:
        axes.set_xlabel("dD: mean of 1 - cosine", fontsize=9, color=MUTED)
    for line in panels:
        line[0].set_ylabel("dM: mean change of magnitude", fontsize=9, color=MUTED)
    panels[0][0].legend(fontsize=7, frameon=False, loc="best", labelcolor=INK)
    if blocks:
        depth_bar(figure, depth, panels, aspect=40)
    return figure


def draw_sizes(study: Mapping[str, Any], points: Sequence[Mapping[str, str]]) -> Figure:
    """dD of each weight at the last checkpoint over the norm of its rows before training, and the line on which every
    weight moved equally far (``dD`` proportional to ``1 / norm^2``). One seed."""
    level, seed = points[0]["level"], points[0]["seed"]
    last = max(int(row["step"]) for row in points if row["level"] == level)
    mine = [row for row in points if (row["level"], row["seed"], int(row["step"])) == (level, seed, last)]
    arms, kinds = list(dict.fromkeys(row["arm"] for row in mine)), list(dict.fromkeys(row["kind"] for row in mine))
    figure = blank(3.5 * len(arms) + 0.9, 3.3)
    panels = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    for axes, arm in zip(panels, arms, strict=True):
        rows = [row for row in mine if row["arm"] == arm and float(row["norm"]) and float(row["delta_direction"])]
        for place, kind in enumerate(kinds):
            axes.plot(
                [float(row["norm"]) for row in rows if row["kind"] == kind],
                [float(row["delta_direction"]) for row in rows if row["kind"] == kind],
                _MARKS[place % len(_MARKS)],
                markersize=5,
                color=INK,
                markerfacecolor="none" if place % 2 else MUTED,
                label=kind,
            )
        if rows:
            products = sorted(float(row["norm"]) ** 2 * float(row["delta_direction"]) for row in rows)
            ends = [min(float(row["norm"]) for row in rows), max(float(row["norm"]) for row in rows)]
            middle = products[len(products) // 2]
            axes.plot(ends, [middle / end**2 for end in ends], color=INK, linewidth=1, label="moved equally far")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_title(arm, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("norm of the rows before training", fontsize=9, color=MUTED)
        plain(axes)
    panels[0].set_ylabel("dD at the last checkpoint", fontsize=9, color=MUTED)
    panels[0].legend(fontsize=8, frameon=False, loc="best", labelcolor=INK)
    return figure


def draw_views(study: Mapping[str, Any]) -> Figure:
    """The correlations of the arms as set, in each view, beside the paper's."""
    level = study["correlations"][0]["level"]
    kinds = kinds_of(study)
    groups = {
        words: [_by_kind(study, kinds, level=level, arm=arm, view=view) for arm in arms_of(study, level)]
        for view, words in VIEW_WORDS.items()
    }
    figure, panels = _dots(groups, kinds)
    for axes in panels:
        for place, row in enumerate(groups[VIEW_WORDS["all"]], 1):
            arm = next(iter(row.values()))["arm"]
            if arm in PAPER:
                axes.plot(PAPER[arm], place, "D", markersize=8, markerfacecolor="none", markeredgecolor=INK, zorder=2)
    if set(PAPER) & set(arms_of(study, level)):
        panels[0].plot([], [], "D", markersize=7, markerfacecolor="none", markeredgecolor=INK, label="paper, VL-BART")
        panels[0].legend(fontsize=8, frameon=False, loc="lower left", labelcolor=INK, borderpad=0)
    return figure


def draw_levels(study: Mapping[str, Any], view: str) -> Figure:
    """The correlations in one view, as set and with one setting changed at a time."""
    kinds = kinds_of(study)
    groups = {}
    for level in dict.fromkeys(row["level"] for row in study["correlations"]):
        rows = [_by_kind(study, kinds, level=level, arm=arm, view=view) for arm in arms_of(study, level)]
        if filled := [row for row in rows if row]:
            groups[level] = filled
    return _dots(groups, kinds)[0]


def _by_kind(study: Mapping[str, Any], kinds: Sequence[str], **wanted: Any) -> dict[str, Mapping[str, Any]]:
    return {row["kind"]: row for row in lines_of(study, **wanted) if row["kind"] in kinds}


def _dots(
    groups: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]], kinds: Sequence[str]
) -> tuple[Figure, list[Axes]]:
    """A panel for each kind; under each group's name a line for each of its arms, a dot with a whisker on it."""
    height = sum(len(rows) + 1.3 for rows in groups.values())
    figure = blank(3.7 * len(kinds) + 1.2, 0.21 * height + 0.9)
    panels = list(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0])
    ticks, place = [], 0.0
    for name, rows in groups.items():
        panels[0].text(-1.0, place, name, fontsize=9, fontweight="bold", color=INK, va="center")
        for row in rows:
            place += 1
            ticks.append((place, next(iter(row.values()))["arm"]))
            for axes, kind in zip(panels, kinds, strict=True):
                if kind in row and row[kind]["mean"] is not None:
                    _dot(axes, place, row[kind])
        place += 1.3
    for axes, kind in zip(panels, kinds, strict=True):
        plain(axes)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(-1.04, 1.04)
        axes.set_ylim(place - 0.6, -0.8)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["-1", "-0.5", "0", "0.5", "1"])
        axes.set_yticks([at for at, _ in ticks], [arm for _, arm in ticks])
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelsize=9, colors=INK)
        axes.xaxis.grid(True, color=LINE, linewidth=0.8)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_axisbelow(True)
        axes.set_title(kind, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("correlation of dM and dD", fontsize=9, color=MUTED)
    return figure, panels


def _dot(axes: Axes, place: float, row: Mapping[str, Any]) -> None:
    if row["low"] is not None:
        axes.plot([row["low"], row["high"]], [place, place], color=INK, linewidth=1.6, solid_capstyle="butt", zorder=3)
    axes.plot(row["mean"], place, "o", color=INK, markersize=5, zorder=4)
    axes.annotate(
        signed(row["mean"]), (row["mean"], place), xytext=(0, 4), textcoords="offset points", fontsize=7, color=MUTED,
        ha="center", va="bottom", zorder=2, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
    )  # fmt: skip
