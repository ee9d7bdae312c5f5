"""The pictures of a search over plans: its runs, what the best plans share, the best one with new seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from trimtab.reports import words
from trimtab.reports.explore_words import best_quarter, best_uniform_runs, numbered, own_runs, plan_words, score_words
from trimtab.reports.pictures import INK, LINE, MUTED, blank, plain

_UNIFORM = "#1166b0"
_DASHES = ("solid", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))

Row = Mapping[str, Any]


def draw_trials(found: Row) -> Figure:
    """Score against the number of the run; the best run of each uniform method is a line across."""
    times = 1 if found["metric"] == "loss" else 100
    rows = list(enumerate(own_runs(found), 1))
    figure = blank(9.2, 4.6)
    axes = figure.subplots()
    plain(axes)
    for state, kind, how in (
        ("complete", "mixed", {"color": INK, "s": 34, "marker": "o", "label": "mixed plan"}),
        ("pruned", "mixed", {"facecolors": "none", "edgecolors": MUTED, "s": 26, "label": "pruned, at its last score"}),
        ("complete", "uniform", {"color": _UNIFORM, "s": 34, "marker": "s", "label": "uniform plan"}),
    ):
        mine = [(place, times * row["score"]) for place, row in rows if (row["state"], row["kind"]) == (state, kind)]
        if mine:
            axes.scatter(*zip(*mine, strict=True), zorder=3, linewidths=1.2, **how)  # type: ignore[arg-type]
    lines = best_uniform_runs(found)
    for place, row in enumerate(lines):
        axes.axhline(times * row["score"], color=_UNIFORM, linewidth=1.1, linestyle=_DASHES[place % 4], zorder=1)
    labels = [(times * row["score"], f"uniform {plan_words(row)}: {score_words(found, row['score'])}") for row in lines]
    if (best := numbered(found, found["best_mixed"])) is not None:
        labels.append((times * best["score"], f"best mixed: {score_words(found, best['score'])}"))
    _label_right(axes, labels)
    axes.set_xlabel("run, in order")
    axes.set_ylabel(f"validation {_metric_words(found)}" + (", lower is better" if found["metric"] == "loss" else ""))
    axes.set_xlim(0.3, len(rows) + 0.7)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8.5, frameon=False)
    axes.set_title(_headline(found), fontsize=10.5, color=INK, loc="left")
    return figure


def _label_right(axes: Any, labels: Sequence[tuple[float, str]]) -> None:
    """Names of heights, right of the frame and pushed apart where they would touch."""
    low, high = axes.get_ylim()
    step, last = (high - low) / 18, low - (high - low)
    for height, text in sorted(labels):
        last = max(height, last + step)
        axes.annotate(
            text,
            (1, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(1.03, last),
            textcoords=axes.get_yaxis_transform(),
            fontsize=8.5,
            color=INK if text.startswith("best") else _UNIFORM,
            fontweight="bold" if text.startswith("best") else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
        )


def draw_shared(found: Row) -> Figure:
    """Group by method: how many of the best mixed plans have it, and with which ranks."""
    best, methods = best_quarter(found), found["methods"]
    figure = blank(1.5 * len(methods) + 2.4, 0.62 * len(found["groups"]) + 1.3)
    axes = figure.subplots()
    plain(axes)
    axes.spines[["left", "bottom"]].set_visible(False)
    every = [row for row in own_runs(found) if row["kind"] == "mixed"]
    for y, group in enumerate(found["groups"]):
        for x, method in enumerate(methods):
            ranks = [row["parts"][y]["rank"] for row in best if row["parts"][y]["method"] == method]
            among = sum(row["parts"][y]["method"] == method for row in every) / len(every)
            share = len(ranks) / len(best)
            axes.add_patch(_square(x, y, share))
            ink = "white" if share > 0.55 else INK
            axes.text(x, y - 0.13, f"{len(ranks)} of {len(best)}", ha="center", va="center", color=ink, fontsize=10)
            rank = "" if not any(ranks) else f"rank {_span(ranks)}, "
            axes.text(x, y + 0.2, f"{rank}all {100 * among:.0f} %", ha="center", va="center", color=ink, fontsize=7.5)
        axes.text(-0.62, y, group["name"], ha="right", va="center", color=INK, fontsize=9.5)
    axes.set_xticks(range(len(methods)), methods)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=10, colors=INK)
    axes.set_yticks([])
    axes.set_xlim(-0.55, len(methods) - 0.45)
    axes.set_ylim(len(found["groups"]) - 0.5, -0.5)
    axes.set_title(
        f"What the best {len(best)} mixed plans use, of {len(every)} that were run", fontsize=10.5, color=INK
    )
    return figure


def _square(x: int, y: int, share: float) -> Any:
    tone = 1 - 0.78 * share
    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=(tone, tone, tone), edgecolor=LINE, linewidth=0.8)


def _span(ranks: Sequence[int]) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"


def draw_confirmed(found: Row) -> Figure:
    """Mixed minus uniform: a mark for each new seed, and the mean with its 95 % interval."""
    said = found["confirmation"]
    loss = found["metric"] == "loss"
    times = 1 if loss else 100
    figure = blank(7.6, 2.1 + 0.22 * len(said["rows"]))
    axes = figure.subplots()
    plain(axes)
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=MUTED, linewidth=1)
    names = [f"seed {row['seed']}" for row in said["rows"]] + ["mean"]
    for y, row in enumerate(said["rows"]):
        axes.plot(times * (row["mixed"] - row["uniform"]), y, "o", color=MUTED, markersize=5.5)
    y = len(said["rows"])
    if said["low"] is not None:
        axes.plot([times * said["low"], times * said["high"]], [y, y], color=INK, linewidth=2)
    axes.plot(times * said["difference"], y, "D", color=INK, markersize=7)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    reach = 1.15 * max(map(abs, axes.get_xlim()))
    axes.set_xlim(-reach, reach)
    for side, at, text in ((-1, 0.01, "mixed" if loss else "uniform"), (1, 0.99, "uniform" if loss else "mixed")):
        align = "left" if side < 0 else "right"
        axes.text(at, 1.02, f"{text} better", transform=axes.transAxes, ha=align, fontsize=8.5, color=MUTED)
    axes.set_xlabel(f"mixed minus uniform: {_metric_words(found).replace('(%)', '(points)')}")
    axes.set_title("The two best plans with new seeds", fontsize=10.5, color=INK, pad=18)
    return figure


def _metric_words(found: Row) -> str:
    return {"loss": "loss (nats per token)", "accuracy": "accuracy (%)", "macro_f1": "macro F1 (%)"}[found["metric"]]


def _headline(found: Row) -> str:
    best = [numbered(found, found[f"best_{kind}"]) for kind in ("mixed", "uniform")]
    said = [
        f"best {kind} {score_words(found, row['score'])}"
        for kind, row in zip(("mixed", "uniform"), best, strict=True)
        if row
    ]
    budget = words.count(found["budget"])
    return f"{', '.join(said).capitalize()}, among {found['runs']} runs within {budget} trained parameters"
