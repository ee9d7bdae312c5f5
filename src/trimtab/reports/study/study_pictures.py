"""The pictures of a study: scores over trained parameters, differences from the reference, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from trimtab.reports.shared import words
from trimtab.reports.shared.figures import (
    INK,
    LINE,
    MUTED,
    PAGE,
    Label,
    at_row,
    blank,
    headed,
    labels_beside,
    named_rows,
    plain,
    write,
)
from trimtab.reports.study.comparison import baseline, panel_name, panels, score_of
from trimtab.runs.study_records import StudyResults, SummaryLine

_DOT, _WIDTH = 5.5, 9.0
_BESIDE = 1.6
"""How many times as many parameters as the last point has the picture reaches to, at both ends."""


def draw_scores(results: StudyResults) -> Figure:
    """A panel per test set: the score of each arm over how many parameters it trains, with intervals over seeds."""
    figure, grid = _grid(len(panels(results)), 1, 4.4)
    series = {arm.arm: arm.series for arm in results.arms}
    for axes, ((task, test), lines) in zip(grid, panels(results).items(), strict=True):
        _scores(axes, lines, series, results.reference)
        headed(axes, f"{panel_name(task, test)} ({words.counted(lines[0].rows, 'test row')})")
    return figure


def _scores(axes: Axes, lines: Sequence[SummaryLine], series: Mapping[str, str | None], reference: str) -> None:
    metric = lines[0].metric
    times = metric.scale
    plain(axes)
    axes.set_xscale("log")
    trained = [line for line in lines if line.costs.trainable_parameters.mean]
    places = _side_by_side(trained)
    names = dict.fromkeys(name for line in trained if (name := series[line.arm]))
    for name, style in zip(names, cycle(("-", "--", ":")), strict=False):
        joined = sorted(
            (x, times * line.mean) for x, line in zip(places, trained, strict=True) if series[line.arm] == name
        )
        axes.plot(*zip(*joined, strict=True), color=MUTED, linewidth=1.2, linestyle=style, zorder=1)
    labels = []
    for x, line in zip(places, trained, strict=True):
        y, is_reference = times * line.mean, line.arm == reference
        if line.ends is not None:
            low, high = line.ends
            if metric.share:
                low, high = max(low, 0), min(high, 1)
            axes.plot([x, x], [times * low, times * high], color=MUTED, linewidth=1.2, zorder=2)
        axes.plot(x, y, "D" if is_reference else "o", color=INK, markersize=_DOT, zorder=3)
        labels.append(Label(f"{line.arm} {score_of(line, line.mean)}", y, x, bold=is_reference))
    if places:
        axes.set_xlim(min(places) / _BESIDE, max(places) * _BESIDE)
    axes.margins(y=0.08)
    flat = [(line.arm, line.mean) for line in lines if line not in trained]
    if (blind := baseline(lines[0])) is not None and metric.share:
        flat.append((blind[0].removeprefix("The ").lower(), blind[1]))
    _flat_lines(axes, [(f"{name} {score_of(lines[0], value)}", times * value) for name, value in flat], bool(trained))
    labels_beside(axes, labels)
    told = FuncFormatter(lambda value, _: words.parameters(value))
    axes.xaxis.set_major_formatter(told)
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(told if max(places, default=1) < 300 * min(places, default=1) else NullFormatter())
    axes.tick_params(which="minor", labelsize=8, colors=MUTED)
    axes.set_xlabel("trained parameters (logarithmic)")
    axes.set_ylabel(metric.label + (", %" if metric.share else ""))


def _flat_lines(axes: Axes, flat: Sequence[tuple[str, float]], trained: bool) -> None:
    """Dashed lines at what needs no training; those far from all points are told in words, to keep the scale."""
    low, high = axes.get_ylim()
    if not trained:
        low, high = min(value for _, value in flat) - 1, max(value for _, value in flat) + 1
    room = 0.35 * (high - low)
    small = {"fontsize": 8, "color": MUTED}
    far = []
    for text, value in flat:
        if not low - room <= value <= high + room:
            far.append(text)
            continue
        low, high = min(low, value - 0.08 * (high - low)), max(high, value + 0.08 * (high - low))
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        where = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
        write(axes, 0.01, value, text, **where, **small)
    axes.set_ylim(low, high)
    if far:
        write(axes, 0.01, 0.01, f"outside of the picture: {', '.join(far)}", xycoords="axes fraction", **small)


def draw_differences(results: StudyResults) -> Figure | None:
    """A panel per test set: each arm's paired difference from the reference; None where there is nothing to compare."""
    shown = {
        # An arm that is not trained is far off, and would leave no room for the others.
        key: [(line, line.difference) for line in lines if line.difference and line.learning_rate is not None]
        for key, lines in panels(results).items()
    }
    shown = {key: lines for key, lines in shown.items() if lines}
    if not shown:
        return None
    most = max(len(lines) for lines in shown.values())
    figure, grid = _grid(len(shown), 2, 1.0 + 0.26 * most)
    left: list[str] = []  # the names on the panel to the left
    for number, (axes, ((task, test), compared)) in enumerate(zip(grid, shown.items(), strict=True)):
        lines = [line for line, _ in compared]
        metric = lines[0].metric
        plain(axes)
        axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
        for place, (_, difference) in enumerate(compared):
            mean, low, high = (metric.scale * at for at in (difference.mean, difference.low, difference.high))
            told = difference.p_holm < 0.05
            axes.plot([low, high], [place, place], color=INK, linewidth=1.4, zorder=2)
            face = INK if told else PAGE
            axes.plot(mean, place, "o", color=INK, markerfacecolor=face, markersize=_DOT, zorder=3)
            at_row(axes, place, words.change(metric, difference.mean), bold=told)
        others = {line.against for line in lines}
        names = [line.arm if len(others) == 1 else f"{line.arm} − {line.against}" for line in lines]
        named_rows(axes, [] if number % 2 and names == left else names, len(lines))
        left = names
        label = metric.label
        above = f"{label} above {others.pop()}" if len(others) == 1 else f"difference in {label}"
        axes.set_xlabel(f"{above}, points" if metric.share else above)
        headed(axes, panel_name(task, test))
    return figure


def draw_costs(results: StudyResults) -> Figure:
    """Training time and peak memory of each arm: a ring per seed, the mean in words."""
    tasks = list(dict.fromkeys(run.task for run in results.runs))
    arms = [arm.arm for arm in results.arms if any(run.arm == arm.arm for run in results.runs)]
    figure = blank(_WIDTH, len(tasks) * (1.0 + 0.26 * len(arms)))
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(grid, tasks, strict=True):
        prefix = "" if len(tasks) == 1 else f"{task}: "
        for axes, key, title, unit, per, told in (
            (row[0], "training_seconds", "training time", "minutes", 60, lambda mean: words.duration(60 * mean)),
            (row[1], "peak_memory_gib", "peak memory", "GiB", 1, words.gib),
        ):
            plain(axes)
            for place, arm in enumerate(arms):
                values = [getattr(run, key) / per for run in results.runs if (run.task, run.arm) == (task, arm)]
                if not values:
                    continue
                mean = sum(values) / len(values)
                axes.plot([0, mean], [place, place], color=LINE, linewidth=5, zorder=1, solid_capstyle="butt")
                axes.plot(values, [place] * len(values), "o", color=INK, markersize=4, markerfacecolor="none", zorder=3)
                at_row(axes, place, told(mean))
            named_rows(axes, arms if axes is row[0] else [], len(arms))
            axes.set_xlim(left=0)
            axes.set_xlabel(unit)
            headed(axes, prefix + title)
    return figure


def _grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """So many panels, at most ``columns`` in a row, each so many inches high."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = blank(_WIDTH, height * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _side_by_side(lines: Sequence[SummaryLine]) -> list[float]:
    """Trained parameters of each line, those within 12 % of one another set side by side so that intervals can be told
    apart: the highest score first, so that the lines to their names do not cross. A step is 4 % of the picture's width,
    and at most 13 %."""
    values = [line.costs.trainable_parameters.mean for line in lines]
    width = max(values, default=1) / min(values, default=1) * _BESIDE**2
    step = min(1.13, width**0.04)
    places, group = list(values), list[int]()
    ascending: list[int | None] = [*sorted(range(len(values)), key=lambda place: values[place]), None]
    for index in ascending:
        if index is not None and (not group or values[index] <= 1.12 * values[group[0]]):
            group.append(index)
            continue
        middle = sum(values[member] for member in group) / max(1, len(group))
        for place, member in enumerate(sorted(group, key=lambda member: -lines[member].mean)):
            places[member] = middle * step ** (place - (len(group) - 1) / 2)
        group = [] if index is None else [index]
    return places
