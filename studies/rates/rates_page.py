"""The study on one page: a picture and a table for each question. Reads what ``rates_results`` wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from auto_check import CLOSE, DIVERGED
from trimtab.reports.shared.figures import blank, plain, write_picture
from trimtab.reports.shared.shell import write_page

EDGE = 0.3
"""Nats a token: as far as the picture of ``auto`` goes."""

_COLOURS = ("#1f5fa8", "#c2571a", "#3a7d44", "#7a4fa3", "#8a6d1f", "#a33b5e")
# Arms that stand in several pictures have one colour in all of them.
_SHARED = dict(zip(("full", "LoRA r8", "DoRA r8", "MoRA r8", "LoRA r1", "LoRA r64"), _COLOURS, strict=True))
_HIGHEST = 1.5
"""Nats a token: as high as the pictures of losses go."""

_PICTURES = {
    "methods": ["full", "LoRA r8", "DoRA r8", "MoRA r8"],
    "ranks": ["LoRA r1", "LoRA r8", "LoRA r64", "MoRA r1", "MoRA r8", "MoRA r64"],
    "alpha": ["LoRA r1", "LoRA r1 alpha 16", "LoRA r8", "LoRA r8 alpha 64", "LoRA r64", "LoRA r64 alpha 16"],
    "steps": ["LoRA r8, 8 steps", "LoRA r8", "LoRA r8, 96 steps", "full, 8 steps", "full", "full, 96 steps"],
}


def write_rates_page(folder: Path, results: Mapping[str, Any], auto: Mapping[str, Any] | None = None) -> Path:
    """Write ``rates.html`` and its pictures into ``folder``; ``auto``: what ``auto_check`` found, if it ran."""
    arms = {(arm["task"], arm["arm"]): arm for arm in results["arms"]}
    tasks = results["said"]["tasks"]
    pictures = {
        name: write_picture(_draw(arms, tasks, names), folder, f"rates-{name}", f"Loss over the learning rate: {name}")
        for name, names in _PICTURES.items()
    }
    questions = [
        (question, [_line(row) for row in results["compared"] if row["question"] == question])
        for question in dict.fromkeys(row["question"] for row in results["compared"])
    ]
    best = [
        [arm["task"], arm["arm"], told(arm["best"]), "at the edge: undecided" if arm["edge"] else "", _share(arm)]
        for arm in results["arms"]
    ]
    values: dict[str, Any] = {"results": results, "pictures": pictures, "questions": questions, "best": best}
    values |= {"auto": auto, "highest": _HIGHEST}
    if auto is not None:
        values["against"] = [_held(setting) for setting in auto["settings"]]
        pictures["auto"] = write_picture(
            _draw_held(auto["settings"]),
            folder,
            "rates-auto",
            "How far auto and 5e-4 end above the best rate of the grid",
        )
    return write_page(folder / "rates.html", "rates_page.html", values, folder=Path(__file__).parent)


def _share(arm: Mapping[str, Any]) -> str:
    return f"{arm['cells']} of {arm['of']}"


def told(known: Mapping[str, Any] | None) -> str:
    """A rate or a ratio with its interval."""
    if known is None:
        return "–"
    interval = f" ({_two(known['low'])} to {_two(known['high'])})" if known["low"] is not None else ", one seed"
    return f"{_two(known['rate'])}{interval}"


def _two(value: float) -> str:
    """To two figures, without an exponent where it is large."""
    return f"{value:.2g}" if value < 99.5 else f"{float(f'{value:.2g}'):,.0f}"


def _line(row: Mapping[str, Any]) -> list[str]:
    verdict = row.get("why", "")
    if (ratio := row["ratio"]) is not None:
        if ratio["low"] is None:
            verdict = "one seed: no interval"
        else:
            verdict = "not told from the same" if ratio["low"] <= 1 <= ratio["high"] else "another"
    known = _two(ratio["rate"]) if ratio is not None and ratio["low"] is None else told(ratio)
    return [row["task"], row["arm"], row["against"], known, verdict]


def _held(setting: Mapping[str, Any]) -> list[str]:
    """A line of the table of ``auto``."""
    rates = ", ".join(f"{rate:.2g}" for rate in setting["auto_rates"])
    over = [f"{setting[name]:+.3f}" if setting[name] < DIVERGED else "diverged" for name in ("auto_over", "fixed_over")]
    return [setting["task"], setting["arm"], f"{setting['best_rate']:.2g}", f"{setting['best_loss']:.3f}", rates, *over]


def _draw_held(settings: Sequence[Mapping[str, Any]]) -> Figure:
    """How far above the grid's best ``auto`` and the fixed rate end: a row a setting. What lies beyond the picture is
    drawn at its edge."""
    figure = blank(6.4, 0.26 * len(settings) + 0.9)
    axes = figure.add_subplot()
    plain(axes)
    for name, key, colour in (("auto", "auto_over", _COLOURS[0]), ("5e-4", "fixed_over", _COLOURS[1])):
        values = [setting[key] for setting in settings]
        for marker, size, shown in (
            ("o", 6, [place for place, value in enumerate(values) if value <= EDGE]),
            (">", 8, [place for place, value in enumerate(values) if value > EDGE]),
        ):
            away = [min(values[place], EDGE) for place in shown]
            axes.plot(away, shown, marker, color=colour, markersize=size, label=name if marker == "o" else None)
    axes.axvline(CLOSE, color="#888888", linewidth=0.8, linestyle="--")
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(settings)), [f"{setting['arm']}, {setting['task']}" for setting in settings], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.03 * EDGE)
    axes.margins(y=0.08)
    axes.set_xlabel("validation loss above that of the grid's best rate (nats a token)", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    figure.set_layout_engine("tight")
    return figure


def _coloured(names: Sequence[str]) -> dict[str, str]:
    """A colour for each arm of a picture."""
    free = iter([colour for colour in _COLOURS if colour not in {_SHARED.get(name) for name in names}])
    return {name: _SHARED[name] if name in _SHARED else next(free) for name in names}


def _draw(arms: Mapping[tuple[str, str], Mapping[str, Any]], tasks: Sequence[str], names: Sequence[str]) -> Figure:
    """Loss over the rate: a panel a task, a line an arm."""
    shown = [task for task in tasks if any((task, name) in arms for name in names)]
    figure = blank(4.2 * len(shown) + 1.6, 3.4)
    for place, task in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        plain(axes)
        for name, colour in _coloured(names).items():
            curve = arms.get((task, name), {"curve": []})["curve"]
            points = [(point["rate"], point["loss"]) for point in curve if point["loss"] is not None]
            if not points:
                continue
            rates, losses = [rate for rate, _ in points], [loss for _, loss in points]
            axes.plot(rates, [loss["mean"] for loss in losses], color=colour, marker="o", markersize=3, label=name)
            low, high = ([math.nan if loss[end] is None else loss[end] for loss in losses] for end in ("low", "high"))
            axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, _HIGHEST)
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("learning rate", fontsize=8)
        axes.set_ylabel("validation loss (nats a token)", fontsize=8)
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    figure.legend([*lines.values()], [*lines], loc="outside right upper", fontsize=7, frameon=False)
    return figure
