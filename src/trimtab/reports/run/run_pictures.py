"""The pictures of a run's page: the share of right answers as bars, and the course of training. No text from data is
ever drawn."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator, NullLocator

from trimtab.reports.run.curves import Curves, Points, thinned
from trimtab.reports.shared import words
from trimtab.reports.shared.figures import (
    ACCENT,
    BEFORE,
    FAINT,
    INK,
    LINE,
    MUTED,
    PAGE,
    WARM,
    Label,
    labels_beside,
    plain,
    screen,
    svg,
    write,
)
from trimtab.runs.rate_record import ChosenRate

_TEXT = 12.0
_MOST_DOTS = 400


def share_bars(
    name: str,
    bars: Sequence[tuple[str, float, tuple[float, float]]],
    baseline: tuple[str, float] | None,
    label: str,
) -> Markup:
    """Shares of 1 as horizontal bars on one scale from 0 to 100 %, with a baseline across all of them.

    ``bars``: what each is called (``before`` is drawn pale), its share, its 95 % interval (a whisker). ``baseline``:
    what it is called, and its share.
    """
    above = 24.0 if baseline is not None else 4.0
    height = above + 34 * len(bars) + 24
    figure = screen(360, height)
    axes = figure.add_axes((52 / 360, 24 / height, 240 / 360, 34 * len(bars) / height))
    _quiet(axes, keep=())
    axes.set_xlim(0, 100)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.tick_params(axis="y", colors=INK)
    axes.xaxis.grid(True, color=LINE, linewidth=1)
    for place, (title, share, (low, high)) in enumerate(bars):
        colour = BEFORE if title == "before" else ACCENT
        axes.barh(place, 100 * share, height=0.6, color=colour, linewidth=0, zorder=2)
        axes.plot([100 * low, 100 * high], [place, place], color=INK, linewidth=1.5, zorder=4, solid_capstyle="butt")
        how = {"va": "center_baseline", "fontweight": "bold", "fontsize": _TEXT + 1, "zorder": 5}
        box = {"facecolor": PAGE, "edgecolor": "none", "pad": 1.5}
        _write(axes, 100 * high, place, words.percent(share), (7, 0), bbox=box, **how)
    if baseline is not None:
        called, share = baseline
        axes.axvline(100 * share, color=INK, linewidth=1.5, linestyle=(0, (4, 3)), zorder=3)
        side = "left" if share < 0.3 else "right" if share > 0.75 else "center"
        _write(axes, 100 * share, -0.5, f"{called} {words.percent(share)}", (0, 6), ha=side, va="baseline")
    return svg(figure, name, label)


def draw_trials(name: str, chosen: ChosenRate, unit: str) -> Markup:
    """The losses of the last round of trials over their rates, with the rate that was chosen as a line."""
    width, height = 360.0, 190.0
    figure = screen(width, height)
    axes = figure.add_axes((50 / width, 40 / height, 290 / width, 120 / height))
    _quiet(axes)
    axes.yaxis.grid(True, color=LINE, linewidth=1)
    axes.set_xscale("log")
    finite = [trial for trial in chosen.last_round if trial.loss is not None]
    points = [(trial.rate, trial.loss) for trial in finite]
    axes.plot(*zip(*points, strict=True), color=ACCENT, linewidth=2.2, marker="o", zorder=3)
    ticks = [trial.rate for trial in chosen.last_round]
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if chosen.is_in_sight:
        axes.axvline(chosen.rate or 0.0, color=INK, linewidth=1.5, linestyle=(0, (4, 3)), zorder=2)
    _title(axes, f"loss ({unit})")
    told = ", ".join(f"{trial.told} at {trial.rate:g}" for trial in finite)
    return svg(figure, name, f"Losses of the trials: {told}")


class Drawn(NamedTuple):
    """A picture, and what it leaves out: how many of the ``points`` of a side are shown at most, and how many of these
    lie outside of it."""

    picture: Markup
    points: int
    outside: int


def draw_numbers(
    name: str, before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]], label: str
) -> Drawn:
    """Numbers that were given over the true ones, ``(true, given)``, before training pale and after it in colour; on
    the line both are equal."""
    width, height = 360.0, 300.0
    figure = screen(width, height)
    axes = figure.add_axes((56 / width, 44 / height, 284 / width, 226 / height))
    _quiet(axes, keep=("left", "bottom"))
    axes.grid(True, color=LINE, linewidth=1)
    # The true numbers and what is given for them after training decide the range; what lay far off before may leave it.
    values = [value for point in after or before for value in point] + [true for true, _ in before]
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin
    axes.plot([low, high], [low, high], color=INK, linewidth=1.5, linestyle=(0, (4, 3)), zorder=2)
    shown = outside = 0
    for points, colour in ((before, BEFORE), (after, ACCENT)):
        if points:
            some = points[:: -(-len(points) // _MOST_DOTS)]
            shown = max(shown, len(some))
            outside += sum(not low <= given <= high for _, given in some)
            axes.plot(*zip(*some, strict=True), color=colour, marker="o", markersize=4, linestyle="none", zorder=3)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"true{_factor(axes.xaxis)}", fontsize=_TEXT, color=INK, labelpad=4)
    _title(axes, "given")
    return Drawn(svg(figure, name, label), shown, outside)


def draw_curves(name: str, data: Curves, width: float, label: str) -> Markup:
    """Loss, the main metric of the validations if there is any, and learning rate, one below the other.

    ``width`` is in CSS pixels; ``label`` tells the picture to who cannot see it.
    """
    narrow = width < 500
    parts = [(190.0 if narrow else 250.0, _loss)]
    parts += [(90.0, _scores)] if data.scores else []
    parts += [(44.0, _rate)] if data.rate else []
    left, right, top, gap, bottom = 50.0, 80.0, 40.0, 34.0, 42.0
    height = top + sum(tall for tall, _ in parts) + gap * (len(parts) - 1) + bottom
    figure = screen(width, height)
    panels: list[Axes] = []
    lower = height - top
    for tall, draw in parts:
        lower -= tall
        box = (left / width, lower / height, (width - left - right) / width, tall / height)
        axes = figure.add_axes(box, sharex=panels[0] if panels else None)
        panels.append(axes)
        lower -= gap
        _quiet(axes)
        axes.yaxis.grid(True, color=LINE, linewidth=1)
        axes.tick_params(axis="x", labelbottom=len(panels) == len(parts))
        draw(axes, data)
    _steps(panels, data, narrow)
    return svg(figure, name, label)


def _loss(axes: Axes, data: Curves) -> None:
    ends = []
    if data.train:
        if data.window > 1:
            axes.plot(*_columns(thinned(data.train)), color=FAINT, linewidth=1, zorder=2)
        axes.plot(*_columns(thinned(data.smooth)), color=ACCENT, linewidth=2.2, zorder=3)
        ends.append(Label("train", data.smooth[-1][1], colour=ACCENT, bold=True))
    if data.validation:
        _validation(axes, data.validation)
        ends.append(Label("validation", data.validation[-1][1], colour=WARM, bold=True))
    axes.set_ylim(*data.limits)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _title(axes, f"loss ({data.unit})", 22 if data.epochs else 8)
    _names(axes, ends)
    best = dict(data.validation).get(data.best_step) if data.best_step is not None else None
    if data.best_step is not None and best is not None:
        _ring(axes, data.best_step, best)
        # On the side of the point where the training line is not, and where there is room.
        near = min(data.smooth, key=lambda point: abs(point[0] - (data.best_step or 0)), default=(0, -math.inf))
        low, high = data.limits
        room = (high - best) / (high - low) * axes.bbox.height
        rise, side = (12, "bottom") if near[1] <= best and room > 26 else (-12, "top")
        steps = [step for step, _ in (*data.train, *data.validation)]
        place = (data.best_step - min(steps)) / (max(steps) - min(steps) or 1)
        align = "right" if place > 0.75 else "left" if place < 0.25 else "center"
        box = {"facecolor": PAGE, "edgecolor": "none", "pad": 1}
        text = f"kept: {words.number(best)} at step {words.count(data.best_step)}"
        _write(axes, data.best_step, best, text, (0, rise), va=side, ha=align, zorder=7, bbox=box)


def _scores(axes: Axes, data: Curves) -> None:
    metric = data.metric
    assert metric is not None, "scores are those of a metric"
    points = [(step, metric.scale * score) for step, score in data.scores]
    _validation(axes, points)
    values = [y for _, y in points]
    spread = max(values) - min(values)
    margin = max(2.0, 0.2 * spread) if metric.share else 0.2 * spread or 1.0
    low, high = min(values) - margin, max(values) + margin
    may_be_negative = metric.higher_is_better and not metric.share  # a correlation
    axes.set_ylim(low if may_be_negative else max(0.0, low), min(100.0, high) if metric.share else high)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    _title(axes, f"validation {metric.axis}")
    _names(axes, [Label(words.figure(metric, data.scores[-1][1]), values[-1], colour=WARM, bold=True)])
    for step, y in points:
        if step == data.best_step:
            _ring(axes, step, y)


def _rate(axes: Axes, data: Curves) -> None:
    _title(axes, "learning rate")
    highest = max(y for _, y in data.rate)
    axes.plot(*_columns(thinned(data.rate)), color=MUTED, linewidth=1.5)
    axes.set_ylim(0, 1.15 * highest or 1.0)
    mantissa, exponent = f"{highest:.1e}".split("e")
    power = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    axes.set_yticks([0, highest] if highest else [0], ["0", power] if highest else ["0"])


def _steps(panels: Sequence[Axes], data: Curves, narrow: bool) -> None:
    """The axis of steps under the last panel, and the ends of the epochs through all of them."""
    steps = [step for points in (data.train, data.validation) for step, _ in points]
    first, last = min(steps), max(steps)
    span = last - first or 1
    panels[-1].set_xlim(first - 0.01 * span, last + 0.02 * span)
    panels[-1].xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
    panels[-1].set_xlabel("step", fontsize=_TEXT, color=INK, labelpad=4)
    every = math.ceil(len(data.epochs) / (3 if narrow else 8)) or 1
    for epoch, step in data.epochs[every - 1 :: every]:
        for panel in panels:
            panel.axvline(step, color=LINE, linewidth=1, zorder=1)
        how = {"xycoords": ("data", "axes fraction"), "color": MUTED, "fontsize": 11}
        late = step > last - 0.08 * span
        _write(panels[0], step, 1.0, f"epoch {epoch}", (0, 4), ha="right" if late else "center", **how)


def _quiet(axes: Axes, keep: Collection[str] = ("bottom",)) -> None:
    """A panel for the screen: pale lines behind what is drawn, and no ticks."""
    plain(axes, size=_TEXT, keep=keep)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    axes.tick_params(length=0, pad=5)
    axes.set_axisbelow(True)


def _write(axes: Axes, x: float, y: float, text: str, shift: tuple[float, float], **how: Any) -> None:
    """Text so many pixels beside a place of the data."""
    write(axes, x, y, text, **{"xytext": shift, "textcoords": "offset points", "fontsize": _TEXT, **how})


def _title(axes: Axes, text: str, rise: float = 8) -> None:
    """Above the left end of a panel that is drawn, ``rise`` pixels up: quicker to read than a turned label."""
    _write(axes, 0, 1, text + _factor(axes.yaxis), (-44, rise), xycoords="axes fraction", fontweight="bold")


def _factor(axis: Axis) -> str:
    """What the ticks of an axis are to be multiplied with, or added to, in words for its name: by itself it would
    stand where another name does."""
    axis.get_offset_text().set_visible(False)
    ticks = axis.get_major_formatter()
    ticks.set_locs(axis.get_majorticklocs().tolist())
    factor = ticks.get_offset()
    return f" × {factor}" if factor.startswith("1e") else f" {factor}".rstrip()


def _names(axes: Axes, ends: Sequence[Label]) -> None:
    """The name of each line at its end."""
    labels_beside(axes, ends, gap=16 / axes.bbox.height, joined=False, size=_TEXT)


def _validation(axes: Axes, points: Points) -> None:
    """Few points, each of which was measured: a mark for each."""
    axes.plot(*_columns(points), color=WARM, linewidth=1.2, marker="o", markersize=6, zorder=4, clip_on=False)


def _ring(axes: Axes, step: float, y: float) -> None:
    """Around the point that was kept."""
    ring: Any = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.8}
    axes.plot([step], [y], marker="o", linestyle="none", clip_on=False, zorder=6, **ring)


def _columns(points: Points) -> tuple[tuple[float, ...], ...]:
    return tuple(zip(*points, strict=True))
