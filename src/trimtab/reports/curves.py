"""The course of a training run as one picture over its steps: loss, validation accuracy if any, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from trimtab.reports import words
from trimtab.reports.folder import Measure
from trimtab.reports.plots import AFTER, INK, LINE, MUTED, RAW, VALIDATION, bare, figure, svg, write

Points = list[tuple[int, float]]

# More points than a screen has pixels make the page heavy and the picture no better.
_MOST_POINTS = 1000


@dataclass(frozen=True)
class Curves:
    """What is drawn, as points of (step, value).

    ``epochs``: at which step each epoch ended. ``window``: how many points a smoothed one is the mean of. ``lost``: at
    how many logged steps the loss was no number.
    """

    train: Points
    smooth: Points
    window: int
    validation: Points
    accuracy: Points
    rate: Points
    epochs: list[tuple[int, float]]
    best_step: int | None
    lost: int

    @property
    def any(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.train or self.validation)

    @property
    def limits(self) -> tuple[float, float]:
        """The range of losses that is drawn."""
        # The rarest single steps may leave the picture: one spike should not flatten everything else.
        raw = sorted(y for _, y in self.train)
        rare = len(raw) // 100
        values = [*raw[rare : len(raw) - rare], *(y for _, y in (*self.smooth, *self.validation))]
        low, high = min(values), max(values)
        # A loss that falls to near nothing is shown against zero; one that moves by a tenth would be flat there.
        bottom = 0.0 if low < 0.35 * high else low - 0.08 * (high - low or high or 1.0)
        return bottom, high + 0.04 * (high - bottom or 1.0)

    @property
    def outside(self) -> int:
        """How many logged steps lie outside the picture."""
        low, high = self.limits
        return sum(1 for _, y in self.train if not low <= y <= high)


def curves(metrics: Sequence[Measure], best_step: int | None) -> Curves:
    """The points of a run's metrics (in the order of steps)."""
    train = [measure for measure in metrics if measure.kind == "train"]
    validation = [measure for measure in metrics if measure.kind == "validation"]
    losses = _points(train, lambda measure: measure.loss)
    window = _window(len(losses))
    return Curves(
        train=losses,
        smooth=smoothed(losses, window),
        window=window,
        validation=_points(validation, lambda measure: measure.loss),
        accuracy=_points(validation, lambda measure: measure.accuracy),
        rate=_points(train, lambda measure: measure.learning_rate),
        epochs=_epochs(metrics),
        best_step=best_step,
        lost=sum(1 for measure in train if measure.loss is not None and not math.isfinite(measure.loss)),
    )


def _points(measures: Sequence[Measure], value: Callable[[Measure], float | None]) -> Points:
    found = ((measure.step, value(measure)) for measure in measures)
    return [(step, y) for step, y in found if y is not None and math.isfinite(y)]


def _window(points: int) -> int:
    """How many points a mean is taken over: odd, about a fifteenth of all; 1 where there are too few to smooth."""
    return 1 if points < 12 else 2 * max(1, round(points / 30)) + 1


def smoothed(points: Points, window: int) -> Points:
    """The mean of ``window`` points around each.

    At the beginning, where a loss falls fast, the window shrinks on both sides, so that nothing is shifted. At the end
    it only loses the points that do not exist, so that the last value, which people quote, is not that of one batch.
    """
    half = window // 2
    result = []
    for place, (step, _) in enumerate(points):
        reach = min(half, place)
        around = [y for _, y in points[place - reach : place + reach + 1]]
        result.append((step, sum(around) / len(around)))
    return result


def thinned(points: Points, most: int = _MOST_POINTS) -> Points:
    """At most ``most`` points: of every stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    buckets = most // 2
    kept: Points = []
    for bucket in range(buckets):
        stretch = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        low, high = min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])
        kept += sorted({low, high})
    return kept


def _epochs(metrics: Sequence[Measure]) -> list[tuple[int, float]]:
    """Where each epoch ended, between two logged steps in proportion."""
    known = [(measure.epoch, float(measure.step)) for measure in metrics if measure.epoch is not None]
    ends = []
    for (earlier, left), (later, right) in pairwise(sorted(known)):
        for epoch in range(math.floor(earlier) + 1, math.floor(later) + 1):
            ends.append((epoch, left + (right - left) * (epoch - earlier) / (later - earlier)))
    return ends


def draw(name: str, data: Curves, width: float) -> Markup:
    """The picture, ``width`` CSS pixels wide."""
    narrow = width < 500
    heights = [190.0 if narrow else 250.0]
    if data.accuracy:
        heights.append(90.0)
    if data.rate:
        heights.append(44.0)
    left, right, top, gap, bottom = 50.0, 80.0, 40.0, 34.0, 42.0
    height = top + sum(heights) + gap * (len(heights) - 1) + bottom
    drawn = figure(width, height)
    panels: list[Axes] = []
    lower = height - top
    for tall in heights:
        lower -= tall
        box = (left / width, lower / height, (width - left - right) / width, tall / height)
        panels.append(drawn.add_axes(box, sharex=panels[0] if panels else None))
        lower -= gap
    for panel in panels:
        bare(panel)
        panel.yaxis.grid(True, color=LINE, linewidth=1)
        panel.set_axisbelow(True)
        panel.tick_params(axis="x", labelbottom=panel is panels[-1])
    rest = iter(panels[1:])
    _loss(panels[0], data)
    if data.accuracy:
        _accuracy(next(rest), data)
    if data.rate:
        _rate(next(rest), data)
    _steps(panels, data, narrow)
    return svg(drawn, name, describe(data))


def _loss(axes: Axes, data: Curves) -> None:
    _title(axes, "loss (nats per token)", 22 if data.epochs else 8)
    if data.train:
        raw = data.window > 1
        if raw:
            axes.plot(*zip(*thinned(data.train), strict=True), color=RAW, linewidth=1, zorder=2)
        axes.plot(*zip(*thinned(data.smooth), strict=True), color=AFTER, linewidth=2.2, zorder=3)
    if data.validation:
        axes.plot(
            *zip(*data.validation, strict=True),
            color=VALIDATION,
            linewidth=1.2,
            marker="o",
            markersize=6,
            zorder=4,
            clip_on=False,
        )
    axes.set_ylim(*data.limits)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    ends = []
    if data.train:
        ends.append((data.smooth[-1], "train", AFTER))
    if data.validation:
        ends.append((data.validation[-1], "validation", VALIDATION))
    _end_labels(axes, ends)
    best = dict(data.validation).get(data.best_step) if data.best_step is not None else None
    if data.best_step is not None and best is not None:
        _ring(axes, data.best_step, best)
        # On the side of the point where the training line is not.
        near = min(data.smooth, key=lambda point: abs(point[0] - (data.best_step or 0)), default=(0, -math.inf))
        where = {"xytext": (0, 12), "va": "bottom"} if near[1] <= best else {"xytext": (0, -12), "va": "top"}
        late = data.best_step > 0.75 * max(step for step, _ in (*data.train, *data.validation))
        text = f"best: {words.number(best)} at step {data.best_step}"
        write(
            axes,
            data.best_step,
            best,
            text,
            textcoords="offset points",
            ha="right" if late else "center",
            zorder=7,
            **where,
        )


def _accuracy(axes: Axes, data: Curves) -> None:
    _title(axes, "validation accuracy (%)")
    points = [(step, 100 * share) for step, share in data.accuracy]
    axes.plot(
        *zip(*points, strict=True), color=VALIDATION, linewidth=1.2, marker="o", markersize=6, zorder=4, clip_on=False
    )
    values = [y for _, y in points]
    margin = max(2.0, 0.2 * (max(values) - min(values)))
    axes.set_ylim(max(0.0, min(values) - margin), min(100.0, max(values) + margin))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    _end_labels(axes, [(points[-1], f"{points[-1][1]:.1f} %", VALIDATION)])
    for step, y in points:
        if step == data.best_step:
            _ring(axes, step, y)


def _rate(axes: Axes, data: Curves) -> None:
    _title(axes, "learning rate")
    highest = max(y for _, y in data.rate)
    axes.plot(*zip(*thinned(data.rate), strict=True), color=MUTED, linewidth=1.5)
    axes.set_ylim(0, 1.15 * highest or 1.0)
    axes.set_yticks([0, highest] if highest else [0], ["0", _power(highest)] if highest else ["0"])


def _steps(panels: Sequence[Axes], data: Curves, narrow: bool) -> None:
    """The axis of steps under the last panel, and the ends of the epochs through all of them."""
    steps = [step for points in (data.train, data.validation) for step, _ in points]
    first, last = min(steps), max(steps)
    span = last - first or 1
    panels[-1].set_xlim(first - 0.01 * span, last + 0.02 * span)
    panels[-1].xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
    panels[-1].set_xlabel("step", fontsize=12, color=INK, labelpad=4)
    every = math.ceil(len(data.epochs) / (3 if narrow else 8)) or 1
    for place, (epoch, step) in enumerate(data.epochs, start=1):
        if place % every:
            continue
        for panel in panels:
            panel.axvline(step, color=LINE, linewidth=1, zorder=1)
        end = step > last - 0.08 * span
        write(
            panels[0],
            step,
            1.0,
            f"epoch {epoch}",
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right" if end else "center",
            color=MUTED,
            fontsize=11,
        )


def _title(axes: Axes, text: str, rise: float = 8) -> None:
    """Above the left end of a panel, ``rise`` pixels up: quicker to read than a turned label."""
    where = {"xycoords": "axes fraction", "xytext": (-44, rise), "textcoords": "offset points"}
    write(axes, 0, 1, text, fontweight="bold", **where)


def _end_labels(axes: Axes, ends: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """The name of each line at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    tall = axes.bbox.height  # in pixels, as the figure has 72 to the inch
    places: list[tuple[float, str, str]] = []
    for (_, y), text, colour in sorted(ends, key=lambda end: end[0][1]):
        wanted = (y - low) / (high - low) * tall
        places.append((max(wanted, places[-1][0] + 16) if places else wanted, text, colour))
    for place, text, colour in places:
        where = {"xycoords": ("axes fraction", "axes pixels"), "xytext": (8, 0), "textcoords": "offset points"}
        write(axes, 1, place, text, color=colour, fontweight="bold", va="center_baseline", **where)


def _ring(axes: Axes, step: float, y: float) -> None:
    """Around the point that was kept."""
    ring: Any = {"markersize": 12, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.8}
    axes.plot([step], [y], marker="o", linestyle="none", clip_on=False, zorder=6, **ring)


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def describe(data: Curves) -> str:
    """The picture in a sentence or two."""
    parts = []
    if data.train:
        (first, high), (last, low) = data.train[0], data.smooth[-1]
        parts.append(
            f"The training loss goes from {words.number(high)} at step {first} to {words.number(low)} at step {last}."
        )
    if data.validation:
        step, low = min(data.validation, key=lambda point: point[1])
        parts.append(f"The lowest validation loss is {words.number(low)}, at step {step}.")
    if data.accuracy:
        step, high = max(data.accuracy, key=lambda point: point[1])
        parts.append(f"The highest validation accuracy is {100 * high:.1f} %, at step {step}.")
    return " ".join(parts)
