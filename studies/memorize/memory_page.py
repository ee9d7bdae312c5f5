"""A memory study as a table, as a picture (character accuracy against steps) and as one page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from trimtab.files import read_json
from trimtab.reports.shared.figures import LINE, MUTED, apart, blank, headed, plain, write, write_picture
from trimtab.reports.shared.shell import write_page

_GUESS = 100 / 16
# A colour, a mark and a dash each; the marks and the direct labels carry the picture where there is no colour.
_LOOKS = {
    "full": ("#16202c", "", (0, (4, 2))),
    "lora": ("#b4500f", "o", "-"),
    "dora": ("#d99a00", "s", "-"),
    "mora-rotation": ("#00548a", "^", "-"),
    "mora-sharing": ("#4aa3df", "v", "-"),
    "mora-magnitude": ("#00805a", "D", "-"),
}
_GAP = 0.07
"""Least distance of two labels, as a share of the axis."""

Arms = Sequence[Mapping[str, Any]]


_TITLES = ("method", "rank", "trained", "rate", "area, %", "end, %", "learnt by", "over LoRA")
EDGE = "*"


def arms_table(results: Mapping[str, Any]) -> Table:
    """A line for each arm, for the terminal; ``footnote`` belongs under it."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for place, title in enumerate(_TITLES):
        table.add_column(title, justify="right" if place else "left", no_wrap=True)
    for arm in results["arms"]:
        table.add_row(*_cells(arm))
    return table


def footnote(results: Mapping[str, Any]) -> str:
    """What a reader must know of single lines of the table; empty where there is nothing."""
    notes = []
    if any(arm["at_edge"] for arm in results["arms"]):
        notes.append(f"{EDGE} the smallest or the largest rate tried was best: a wider search might do better.")
    notes += [
        f"{_name(arm)}: {arm['diverged']} of {len(arm['seeds'])} curves diverged; nothing counts as right from there."
        for arm in results["arms"]
        if arm["diverged"]
    ]
    return "\n".join(notes)


def _cells(arm: Mapping[str, Any]) -> list[str]:
    against = arm["against_reference"]
    return [
        arm["label"],
        _ranks(arm),
        f"{arm['parameters']:,}",
        f"{arm['learning_rate']:g}{EDGE if arm['at_edge'] else ''}",
        _interval(arm["area"]),
        f"{100 * arm['final']['mean']:.1f}",
        _learnt(arm["steps_to_learnt"]),
        _interval(against, signed=True) if against else "",
    ]


def _ranks(arm: Mapping[str, Any]) -> str:
    """``8``, or ``7-8`` where matrices differ."""
    ranks = sorted({rule["rank"] for rule in arm["plan"] if "rank" in rule})
    return "-".join(map(str, ranks))


def _interval(mean: Mapping[str, Any], signed: bool = False) -> str:
    """``53.2 ± 5.1`` in per cent, half of the 95 % interval; the mean alone where there is none."""
    half = "" if mean["low"] is None else f" ± {100 * (mean['high'] - mean['mean']):.1f}"
    return f"{100 * mean['mean']:{'+' if signed else ''}.1f}{half}"


def _learnt(steps: Sequence[int | None]) -> str:
    """``240-280`` over the seeds; ``never`` stands for those that did not."""
    reached = sorted(step for step in steps if step is not None)
    ends = [f"{step:,}" for step in dict.fromkeys([*reached[:1], *reached[-1:]])]
    if None in steps:
        ends = [*ends[:1], "never"]
    return "-".join(ends)


def panels(results: Mapping[str, Any]) -> Iterator[tuple[int | None, list[Mapping[str, Any]]]]:
    """Each budget with its arms, those without a budget in every one; one panel without a budget if there is none."""
    budgets = list(dict.fromkeys(arm["budget"] for arm in results["arms"] if arm["budget"] is not None))
    for budget in budgets or [None]:
        yield budget, [arm for arm in results["arms"] if arm["budget"] in (budget, None)]


def draw(results: Mapping[str, Any]) -> Figure:
    """A panel for each budget; a line for each method, the mean over seeds, in the band from lowest to highest."""
    shown = list(panels(results))
    figure = blank(8.4, 3.9 * len(shown))
    # One below the other: a step stands under the same step.
    for axes, (budget, arms) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        _panel(axes, budget, arms, results)
    return figure


def _panel(axes: Axes, budget: int | None, arms: Arms, results: Mapping[str, Any]) -> None:
    last = results["study"]["steps"]
    for arm in arms:
        colour, mark, dash = _LOOKS[arm["contender"]]
        steps = [point["step"] for point in arm["curve"]]
        axes.plot(
            steps,
            [100 * point["mean"] for point in arm["curve"]],
            color=colour,
            linestyle=dash,
            linewidth=1.6,
            marker=mark,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            markevery=max(1, len(steps) // 10),
            clip_on=False,
            zorder=3,
        )
        low, high = ([100 * point[end] for point in arm["curve"]] for end in ("lowest", "highest"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.axhline(_GUESS, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    below = {"xytext": (0, -3), "textcoords": "offset points", "va": "top", "ha": "right"}
    write(axes, 0.995 * last, _GUESS, "guessing", fontsize=8, color=MUTED, **below)
    _labels(axes, arms, last)
    axes.set(xlim=(0, last), ylim=(0, 100))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("characters right, %")
    plain(axes)
    sizes = {arm["parameters"] for arm in arms if arm["contender"] == "lora"} or {arms[-1]["parameters"]}
    title = "full fine-tuning" if budget is None else f"the cost of LoRA of rank {budget}: {max(sizes):,} parameters"
    headed(axes, title, bold=False)


def _labels(axes: Axes, arms: Arms, last: int) -> None:
    """The methods' names beside the ends of their lines, the best on top, pushed apart where the lines meet."""
    ordered = sorted(arms, key=lambda arm: (arm["final"]["mean"], arm["area"]["mean"]))
    for arm, place in zip(ordered, apart([arm["final"]["mean"] for arm in ordered], _GAP), strict=True):
        colour, mark, _ = _LOOKS[arm["contender"]]
        end, at = 100 * arm["curve"][-1]["mean"], 100 * place
        axes.plot([last, 1.03 * last, 1.05 * last], [end, at, at], color=colour, linewidth=0.8, clip_on=False)
        axes.plot([1.05 * last], [at], color=colour, marker=mark or "_", markersize=4.5, clip_on=False)
        write(axes, 1.07 * last, at, f"{arm['label']}: {_when(arm)}", va="center_baseline")


def _when(arm: Mapping[str, Any]) -> str:
    """What the line comes to, in words: the median step at which all is learnt, else how much is at the end."""
    steps = arm["steps_to_learnt"]
    if None in steps:
        return f"{100 * arm['final']['mean']:.0f} %"
    return f"learnt by {statistics.median_high(steps):,}"


def write_memory_page(folder: Path) -> Path:
    """Write ``memorize.png``, ``memorize.svg`` and ``memorize.html`` beside the ``memorize.json`` in ``folder``."""
    results = read_json(folder / "memorize.json")
    arms = results["arms"]
    label = "Character accuracy against steps, a panel for each budget"
    values = {
        "results": results,
        "study": results["study"],
        "picture": write_picture(draw(results), folder, "memorize", label),
        "titles": _TITLES,
        "lines": [_cells(arm) for arm in arms],
        "rates": ["", *(f"rate {1 + number}" for number in range(max(len(arm["candidates"]) for arm in arms)))],
        "search": [
            [_name(arm), *(f"{one['learning_rate']:g}: {100 * one['area']:.1f}" for one in arm["candidates"])]
            for arm in arms
        ],
        "notes": footnote(results).replace("\n", " "),
    }
    return write_page(folder / "memorize.html", "memory_page.html", values, folder=Path(__file__).parent)


def _name(arm: Mapping[str, Any]) -> str:
    return str(arm["label"]) if arm["budget"] is None else f"{arm['label']}, budget of rank {arm['budget']}"
