"""The pictures of a study: accuracy over trained parameters, differences from the reference, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from trimtab.reports import words
from trimtab.reports.pictures import INK, LINE, MUTED, blank, plain

Line = Mapping[str, Any]
_DOT, _LABEL, _WIDTH = 5.5, 8.5, 9.0
_BESIDE = 1.6
"""How many times as many parameters as the last point has the picture reaches to, at both ends."""
_NAMES = {"accuracy": "accuracy", "exact_match": "exact match", "perplexity": "perplexity"}


def panels(results: Mapping[str, Any]) -> dict[tuple[str, str], list[Line]]:
    """(task, test set) -> the lines of its summary."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in results["summary"]:
        found.setdefault((line["task"], line["test"]), []).append(line)
    return found


def panel_name(task: str, test: str) -> str:
    """``finance: fpb``, or the test set alone where the task has no name of its own."""
    return test if task in ("all", test) else f"{task}: {test}"


def baseline(line: Line) -> tuple[str, float] | None:
    """What answers without a look at the rows reach: who gives them, and the share that is right."""
    known = (("The commonest answer", line["majority"]), ("Guessing", line["chance"]))
    return next(((name, share) for name, share in known if share is not None), None)


def draw_scores(results: Mapping[str, Any]) -> Figure:
    """A panel per test set: the score of each arm over how many parameters it trains, with intervals over seeds."""
    figure, grid = _grid(len(panels(results)), 1, 4.4)
    series = {arm["arm"]: arm["series"] for arm in results["arms"]}
    for axes, ((task, test), lines) in zip(grid, panels(results).items(), strict=True):
        _scores(axes, lines, series, results["reference"])
        rows = f"{words.count(lines[0]['rows'])} test rows"
        axes.set_title(f"{panel_name(task, test)} ({rows})", fontsize=10, color=INK, loc="left", fontweight="bold")
    return figure


def _scores(axes: Axes, lines: Sequence[Line], series: Mapping[str, str | None], reference: str) -> None:
    measure = lines[0]["measure"]
    scale = 1 if measure == "perplexity" else 100
    plain(axes)
    axes.set_xscale("log")
    trained = [line for line in lines if line["costs"]["trainable_parameters"]["mean"]]
    places = _apart(trained)
    names = dict.fromkeys(found for line in trained if (found := series[line["arm"]]))
    for name, style in zip(names, cycle(("-", "--", ":")), strict=False):
        joined = sorted(
            (x, scale * line["mean"]) for x, line in zip(places, trained, strict=True) if series[line["arm"]] == name
        )
        axes.plot(*zip(*joined, strict=True), color=MUTED, linewidth=1.2, linestyle=style, zorder=1)
    labels = []
    for x, line in zip(places, trained, strict=True):
        y, is_reference = scale * line["mean"], line["arm"] == reference
        if line["low"] is not None:
            ends = (
                [line["low"], line["high"]] if measure == "perplexity" else [max(line["low"], 0), min(line["high"], 1)]
            )
            axes.plot([x, x], [scale * end for end in ends], color=MUTED, linewidth=1.2, zorder=2)
        axes.plot(x, y, "D" if is_reference else "o", color=INK, markersize=_DOT, zorder=3)
        labels.append((x, y, f"{line['arm']} {_score(line, line['mean'])}", is_reference))
    if places:
        axes.set_xlim(min(places) / _BESIDE, max(places) * _BESIDE)
    axes.margins(y=0.08)
    flat = [(line["arm"], line["mean"]) for line in lines if line not in trained]
    if (blind := baseline(lines[0])) is not None and measure == "accuracy":
        flat.append((blind[0].removeprefix("The ").lower(), blind[1]))
    _flat_lines(axes, [(name, scale * value, _score(lines[0], value)) for name, value in flat], bool(trained))
    _labels_beside(axes, labels)
    told = FuncFormatter(lambda value, _: words.parameters(value))
    axes.xaxis.set_major_formatter(told)
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(told if max(places, default=1) < 300 * min(places, default=1) else NullFormatter())
    axes.tick_params(which="minor", labelsize=8, colors=MUTED)
    axes.set_xlabel("trained parameters (logarithmic)")
    axes.set_ylabel(_NAMES[measure] + (", %" if scale == 100 else ""))


def _flat_lines(axes: Axes, flat: Sequence[tuple[str, float, str]], trained: bool) -> None:
    """Dashed lines at what needs no training; those far from all points are told in words, to keep the scale."""
    low, high = axes.get_ylim()
    if not trained:
        low, high = min(value for _, value, _ in flat) - 1, max(value for _, value, _ in flat) + 1
    room = 0.35 * (high - low)
    far = []
    for name, value, text in flat:
        if low - room <= value <= high + room:
            low, high = min(low, value - 0.08 * (high - low)), max(high, value + 0.08 * (high - low))
            axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"{name} {text}",
                (0.01, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=_LABEL - 0.5,
                color=MUTED,
            )
        else:
            far.append(f"{name} {text}")
    axes.set_ylim(low, high)
    if far:
        axes.annotate(
            f"outside of the picture: {', '.join(far)}",
            (0.01, 0.01),
            xycoords="axes fraction",
            fontsize=_LABEL - 0.5,
            color=MUTED,
        )


def _labels_beside(axes: Axes, labels: Sequence[tuple[float, float, str, bool]]) -> None:
    """Names in a column at the right, in the order of the points, each joined to its own."""
    low, high = axes.get_ylim()
    ordered = sorted(labels, key=lambda label: label[1])
    heights = _spread([(y - low) / (high - low) for _, y, _, _ in ordered], 0.055)
    for (x, y, text, bold), height in zip(ordered, heights, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=_LABEL,
            color=INK,
            va="center",
            fontweight="bold" if bold else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": MUTED,
                "alpha": 0.6,
                "linewidth": 0.8,
                "shrinkA": 0,
                "shrinkB": 4,
                "zorder": 0,
            },
        )


def draw_differences(results: Mapping[str, Any]) -> Figure | None:
    """A panel per test set: each arm's paired difference from the reference; None where there is nothing to compare."""
    shown = {
        # An arm that is not trained is far off, and would leave no room for the others.
        key: [line for line in lines if line["difference"] is not None and line["learning_rate"] is not None]
        for key, lines in panels(results).items()
    }
    shown = {key: lines for key, lines in shown.items() if lines}
    if not shown:
        return None
    most = max(len(lines) for lines in shown.values())
    figure, grid = _grid(len(shown), 2, 1.0 + 0.26 * most)
    beside: list[str] = []  # the names on the panel to the left
    for number, (axes, ((task, test), lines)) in enumerate(zip(grid, shown.items(), strict=True)):
        plain(axes)
        axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
        for place, line in enumerate(lines):
            found = line["difference"]
            axes.plot([100 * found["low"], 100 * found["high"]], [place, place], color=INK, linewidth=1.4, zorder=2)
            face = INK if found["p_holm"] < 0.05 else "white"
            axes.plot(100 * found["mean"], place, "o", color=INK, markerfacecolor=face, markersize=_DOT, zorder=3)
            axes.annotate(
                words.signed(100 * found["mean"], 1),
                (1.02, place),
                xycoords=("axes fraction", "data"),
                fontsize=_LABEL,
                color=INK,
                va="center",
                fontweight="bold" if found["p_holm"] < 0.05 else "normal",
            )
        others = {line["against"] for line in lines}
        names = [line["arm"] if len(others) == 1 else f"{line['arm']} − {line['against']}" for line in lines]
        _name_rows(axes, [] if number % 2 and names == beside else names, len(lines))
        beside = names
        measure = _NAMES[lines[0]["measure"]]
        above = f"{measure} above {others.pop()}" if len(others) == 1 else f"difference in {measure}"
        axes.set_xlabel(f"{above}, points")
        axes.set_title(panel_name(task, test), fontsize=10, color=INK, loc="left", fontweight="bold")
    return figure


def draw_costs(results: Mapping[str, Any]) -> Figure:
    """Training time and peak memory of each arm: a dot per seed, the mean in words."""
    tasks = list(dict.fromkeys(run["task"] for run in results["runs"]))
    arms = [arm["arm"] for arm in results["arms"] if any(run["arm"] == arm["arm"] for run in results["runs"])]
    figure = blank(_WIDTH, len(tasks) * (1.0 + 0.26 * len(arms)))
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(grid, tasks, strict=True):
        prefix = "" if len(tasks) == 1 else f"{task}: "
        for axes, key, title, unit, per, told in (
            (row[0], "training_seconds", "training time", "minutes", 60, lambda mean: words.duration(60 * mean)),
            (row[1], "peak_memory_gib", "peak memory", "GiB", 1, lambda mean: f"{mean:.2f} GiB"),
        ):
            plain(axes)
            for place, arm in enumerate(arms):
                values = [run[key] / per for run in results["runs"] if (run["task"], run["arm"]) == (task, arm)]
                if not values:
                    continue
                mean = sum(values) / len(values)
                axes.plot([0, mean], [place, place], color=LINE, linewidth=5, zorder=1, solid_capstyle="butt")
                axes.plot(values, [place] * len(values), "o", color=INK, markersize=4, markerfacecolor="none", zorder=3)
                axes.annotate(
                    told(mean),
                    (1.02, place),
                    xycoords=("axes fraction", "data"),
                    fontsize=_LABEL,
                    color=INK,
                    va="center",
                )
            _name_rows(axes, arms if axes is row[0] else [], len(arms))
            axes.set_xlim(left=0)
            axes.set_xlabel(unit)
            axes.set_title(prefix + title, fontsize=10, color=INK, loc="left", fontweight="bold")
    return figure


def _name_rows(axes: Axes, names: Sequence[str], count: int) -> None:
    """Names in place of an axis for ``count`` rows, the first on top; no names where the panel to the left has them."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelsize=_LABEL, colors=INK, length=0)
    axes.set_ylim(count - 0.4, -0.6)
    axes.spines["left"].set_visible(False)


def _grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """So many panels, at most ``columns`` in a row, each so many inches high."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = blank(_WIDTH, height * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _apart(lines: Sequence[Line]) -> list[float]:
    """Trained parameters of each line, those within 12 % of one another set side by side so that intervals can be told
    apart: the highest score first, so that the lines to their names do not cross. A step is 4 % of the picture's width,
    and at most 13 %."""
    values = [line["costs"]["trainable_parameters"]["mean"] for line in lines]
    width = max(values, default=1) / min(values, default=1) * _BESIDE**2
    step = min(1.13, width**0.04)
    found, group = list(values), list[int]()
    ascending: list[int | None] = [*sorted(range(len(values)), key=lambda place: values[place]), None]
    for index in ascending:
        if index is not None and (not group or values[index] <= 1.12 * values[group[0]]):
            group.append(index)
            continue
        middle = sum(values[member] for member in group) / max(1, len(group))
        for place, member in enumerate(sorted(group, key=lambda member: -lines[member]["mean"])):
            found[member] = middle * step ** (place - (len(group) - 1) / 2)
        group = [] if index is None else [index]
    return found


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights between 0 and 1, moved as little as keeps them ``gap`` apart."""
    groups: list[list[float]] = []  # each a run of labels that touch, laid around the middle of where they belong
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _laid(groups[-2], gap)[-1] + gap > _laid(groups[-1], gap)[0]:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [height for group in groups for height in _laid(group, gap)]


def _laid(group: Sequence[float], gap: float) -> list[float]:
    span = gap * (len(group) - 1)
    first = min(max(0.0, sum(group) / len(group) - span / 2), max(0.0, 1 - span))
    return [first + gap * place for place in range(len(group))]


def _score(line: Line, value: float) -> str:
    return words.number(value) if line["measure"] == "perplexity" else f"{100 * value:.1f} %"
