"""A memory study as a table, as a picture (character accuracy against steps) and as one page."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from trimtab.files import read_json, write_text
from trimtab.reports.shared.figures import INK, LINE, MUTED, blank, plain, write_picture
from trimtab.reports.shared.shell import html_table, page

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
_GAP = 7.0
"""Least distance of two labels, in per cent of the axis."""

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
    axes.annotate("guessing", (0.995 * last, _GUESS), xytext=(0, -3), textcoords="offset points", fontsize=8,
                  color=MUTED, va="top", ha="right")  # fmt: skip
    _labels(axes, arms, last)
    axes.set(xlim=(0, last), ylim=(0, 100))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("characters right, %")
    plain(axes)
    sizes = {arm["parameters"] for arm in arms if arm["contender"] == "lora"} or {arms[-1]["parameters"]}
    title = "full fine-tuning" if budget is None else f"the cost of LoRA of rank {budget}: {max(sizes):,} parameters"
    axes.set_title(title, fontsize=10, color=INK, loc="left")


def _labels(axes: Axes, arms: Arms, last: int) -> None:
    """The methods' names beside the ends of their lines, the best on top, pushed apart where the lines meet."""
    ordered = sorted(arms, key=lambda arm: (arm["final"]["mean"], arm["area"]["mean"]))
    place = float("-inf")
    places = []
    for arm in ordered:
        place = max(100 * arm["final"]["mean"], place + _GAP)
        places.append(place)
    top = 101.0
    for index in reversed(range(len(places))):  # what stands above the axis is pushed down again
        top = min(places[index], top)
        places[index] = top
        top -= _GAP
    for arm, at in zip(ordered, places, strict=True):
        colour, mark, _ = _LOOKS[arm["contender"]]
        end = 100 * arm["curve"][-1]["mean"]
        axes.plot([last, 1.03 * last, 1.05 * last], [end, at, at], color=colour, linewidth=0.8, clip_on=False)
        axes.plot([1.05 * last], [at], color=colour, marker=mark or "_", markersize=4.5, clip_on=False)
        axes.annotate(
            f"{arm['label']}: {_when(arm)}",
            (1.07 * last, at),
            annotation_clip=False,
            fontsize=8.5,
            color=INK,
            va="center_baseline",
        )


def _when(arm: Mapping[str, Any]) -> str:
    """What the line comes to, in words: the median step at which all is learnt, else how much is at the end."""
    steps = arm["steps_to_learnt"]
    if None in steps:
        return f"{100 * arm['final']['mean']:.0f} %"
    return f"learnt by {statistics.median_high(steps):,}"


def write_memory_page(folder: Path) -> Path:
    """Write ``memorize.png``, ``memorize.svg`` and ``memorize.html`` beside the ``memorize.json`` in ``folder``."""
    results = read_json(folder / "memorize.json")
    picture = write_picture(
        draw(results), folder, "memorize", "Character accuracy against steps, a panel for each budget"
    )
    write_text(folder / "memorize.html", _page(results, picture))
    return folder / "memorize.html"


def _page(results: Mapping[str, Any], picture: str) -> str:
    study = results["study"]
    seeds = study["seeds"]
    tried = max(len(arm["candidates"]) for arm in results["arms"])
    blocks = f"the first {study['blocks']} blocks" if study["blocks"] else "all blocks"
    notes = html.escape(footnote(results)).replace("\n", " ")
    search = [
        [_name(arm), *(f"{one['learning_rate']:g}: {100 * one['area']:.1f}" for one in arm["candidates"])]
        for arm in results["arms"]
    ]
    rates = ["", *[f"rate {number}" for number in range(1, tried + 1)]]
    machine, learnt = results["machine"], results["learnt"]
    body = f"""<h1>Who learns random identifiers by heart, at equal cost</h1>
<p class="about">{study["pairs"]:,} pairs of {study["digits"]} hexadecimal digits, {blocks} of
{html.escape(study["model"])}, {study["batch_size"]} pairs a step. A line is the mean of {seeds} seeds, its band goes
from the lowest to the highest.</p>
{picture}
<section><h2>In numbers</h2>
{html_table(_TITLES, [_cells(arm) for arm in results["arms"]])}
<p class="fine">Accuracy is that of the value that the model writes by itself, greedily, after the key. Area: the mean
over all points of the curve. Learnt by: the step at which {100 * learnt:g} % of the characters are right, from
the first seed to the last. Over LoRA: the difference in area at the same budget, seed by seed on the same pairs in the
same order. ±: half of the mean's 95 % interval over seeds (Student); where it reaches beyond 0, no difference is shown.
Rank: where two are named, some matrices have the one and some the other, so that magnitudes, too, are paid from the
budget.</p></section>
<section><h2>The search for a learning rate</h2>
{html_table(rates, search)}
<p class="fine">Each rate and the area under its curve, in %, on the pairs of a seed of its own, which is in no curve
above. Every method tries as many; the largest area is taken. {notes} The rate rises over {study["warmup"]} steps and
stays.</p>
<p class="fine">{results["cells"]} cells, {results["seconds"] / 60:.0f} minutes of training and evaluation on
{machine["cores"]} cores ({html.escape(str(machine["processor"]))}), frozen weights in {study["precision"]}; torch
{results["versions"]["torch"]}, transformers {results["versions"]["transformers"]}.</p></section>
"""
    return page("Memory study", body)


def _name(arm: Mapping[str, Any]) -> str:
    return str(arm["label"]) if arm["budget"] is None else f"{arm['label']}, budget of rank {arm['budget']}"
