"""The pictures of a search over plans: its runs, what the best plans share, the best one with new seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from trimtab.reports.search.search_words import (
    best_quarter,
    best_uniform_runs,
    own_runs,
    plan_words,
    score_words,
)
from trimtab.reports.shared import words
from trimtab.reports.shared.figures import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    PAGE,
    Label,
    blank,
    headed,
    labels_beside,
    named_rows,
    plain,
)
from trimtab.runs.study_records import SearchResults

_DASHES = ("solid", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))


def draw_trials(search: SearchResults) -> Figure:
    """Score against the number of the run; the best run of each uniform method is a line across."""
    metric = search.improved
    times = metric.scale
    rows = list(enumerate(own_runs(search), 1))
    figure = blank(9.2, 4.6)
    axes = figure.subplots()
    for state, kind, how in (
        ("complete", "mixed", {"color": INK, "s": 34, "marker": "o", "label": "mixed plan"}),
        ("pruned", "mixed", {"facecolors": "none", "edgecolors": MUTED, "s": 26, "label": "pruned, at its last score"}),
        ("complete", "uniform", {"color": ACCENT, "s": 34, "marker": "s", "label": "uniform plan"}),
    ):
        mine = [(place, times * row.scored) for place, row in rows if (row.state, row.kind) == (state, kind)]
        if mine:
            axes.scatter(*zip(*mine, strict=True), zorder=3, linewidths=1.2, **how)  # type: ignore[arg-type]
    labels = []
    for place, row in enumerate(best_uniform_runs(search)):
        height = times * row.scored
        axes.axhline(height, color=ACCENT, linewidth=1.1, linestyle=_DASHES[place % 4], zorder=1)
        text = f"uniform {plan_words(row)}: {score_words(search.improved, row.score)}"
        labels.append(Label(text, height, colour=ACCENT))
    if (best := search.numbered(search.best_mixed)) is not None:
        text = f"best mixed: {score_words(search.improved, best.score)}"
        labels.append(Label(text, times * best.scored, bold=True))
    labels_beside(axes, labels)
    axes.set_xlabel("run, in order")
    axes.set_ylabel(f"validation {metric.axis}" + ("" if metric.higher_is_better else ", lower is better"))
    axes.set_xlim(0.3, len(rows) + 0.7)
    plain(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8.5, frameon=False)
    headed(axes, _headline(search), bold=False)
    return figure


def draw_shared(search: SearchResults) -> Figure:
    """Group by method: how many of the best mixed plans have it, and with which ranks."""
    best, methods = best_quarter(search), search.methods
    figure = blank(1.5 * len(methods) + 2.4, 0.62 * len(search.groups) + 1.3)
    axes = figure.subplots()
    every = [row for row in own_runs(search) if row.kind == "mixed"]
    centred: dict[str, Any] = {"ha": "center", "va": "center"}
    for y in range(len(search.groups)):
        for x, method in enumerate(methods):
            ranks = [row.parts[y].rank for row in best if row.parts[y].method == method]
            among = sum(row.parts[y].method == method for row in every) / len(every)
            share = len(ranks) / len(best)
            grey = (1 - 0.78 * share,) * 3
            axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=grey, edgecolor=LINE, linewidth=0.8))
            ink = PAGE if share > 0.55 else INK
            axes.text(x, y - 0.13, f"{len(ranks)} of {len(best)}", color=ink, fontsize=10, **centred)
            rank = f"rank {_span(ranks)}, " if any(ranks) else ""
            axes.text(x, y + 0.2, f"{rank}all {100 * among:.0f} %", color=ink, fontsize=7.5, **centred)
    plain(axes, keep=())
    named_rows(axes, [group.name for group in search.groups], len(search.groups))
    axes.set_xticks(range(len(methods)), methods)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=10, colors=INK)
    axes.set_xlim(-0.55, len(methods) - 0.45)
    axes.set_ylim(len(search.groups) - 0.5, -0.5)
    headed(axes, f"What the best {len(best)} mixed plans use, of {len(every)} that were run", bold=False)
    return figure


def _span(ranks: Sequence[int]) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"


def draw_confirmed(search: SearchResults) -> Figure:
    """Mixed minus uniform: a mark for each new seed, and the mean with its 95 % interval."""
    confirmation = search.confirmation
    assert confirmation is not None, "drawn of a search that was confirmed"
    seeds = confirmation.rows
    metric = search.improved
    times = metric.scale
    figure = blank(7.6, 2.1 + 0.22 * len(seeds))
    axes = figure.subplots()
    plain(axes)
    axes.axvline(0, color=MUTED, linewidth=1)
    for y, row in enumerate(seeds):
        axes.plot(times * (row.mixed - row.uniform), y, "o", color=MUTED, markersize=5.5)
    mean = len(seeds)
    if confirmation.ends is not None:
        axes.plot([times * end for end in confirmation.ends], [mean, mean], color=INK, linewidth=2)
    axes.plot(times * confirmation.difference, mean, "D", color=INK, markersize=7)
    named_rows(axes, [*(f"seed {row.seed}" for row in seeds), "mean"], mean + 1)
    reach = 1.15 * max(map(abs, axes.get_xlim()))
    axes.set_xlim(-reach, reach)
    sides = ("uniform", "mixed") if metric.higher_is_better else ("mixed", "uniform")
    for name, at, align in zip(sides, (0.01, 0.99), ("left", "right"), strict=True):
        axes.text(at, 1.02, f"{name} better", transform=axes.transAxes, ha=align, fontsize=8.5, color=MUTED)
    axes.set_xlabel(f"mixed minus uniform: {metric.axis.replace('(%)', '(points)')}")
    axes.set_title("The two best plans with new seeds", fontsize=10, color=INK, pad=18)
    return figure


def _headline(search: SearchResults) -> str:
    """The best mixed and the best uniform plan, among how many runs."""
    best = [
        f"best {kind} {score_words(search.improved, row.score)}"
        for kind in ("mixed", "uniform")
        if (row := search.numbered(getattr(search, f"best_{kind}")))
    ]
    budget = words.count(search.budget)
    return (
        f"{', '.join(best).capitalize()}, among {words.counted(search.runs, 'run')} within {budget} trained parameters"
    )
