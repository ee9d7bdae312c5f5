"""The course of a training run as points over its steps: loss, score of the validations, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trimtab.metrics import Metric
from trimtab.reports.shared import words
from trimtab.runs.records import MetricsLine, Summary

Points = list[tuple[int, float]]

# More points than a screen has pixels make the page heavy and the picture no better.
_MOST_POINTS = 1000


@dataclass(frozen=True)
class Curves:
    """What is drawn, as points of (step, value).

    ``scores``: the validations by ``metric``, the first of the table that they have beside their loss; None without.
    ``epochs``: at which step each epoch ended. ``window``: how many points a smoothed one is the mean of. ``lost``: at
    how many logged steps the loss was no number. ``unit``: of the loss.
    """

    train: Points
    smooth: Points
    window: int
    validation: Points
    scores: Points
    metric: Metric | None
    rate: Points
    epochs: list[tuple[int, float]]
    best_step: int | None
    lost: int
    unit: str = "nats per token"

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


def curves(
    metrics: Sequence[MetricsLine], best_step: int | None, metric: Metric | None, unit: str = Summary().loss_unit
) -> Curves:
    """The points of a run's metrics (in the order of steps); ``metric``: the one by which validations are drawn;
    ``unit``: of the loss."""
    train = [measure for measure in metrics if measure.kind == "train"]
    validation = [measure for measure in metrics if measure.kind == "validation"]
    losses = _points(train, lambda measure: measure.loss)
    window = _window(len(losses))
    return Curves(
        train=losses,
        smooth=smoothed(losses, window),
        window=window,
        validation=_points(validation, lambda measure: measure.loss),
        scores=_points(validation, lambda measure: measure.figure(metric.name) if metric is not None else None),
        metric=metric,
        rate=_points(train, lambda measure: measure.learning_rate),
        epochs=_epochs(metrics),
        best_step=best_step,
        lost=sum(1 for measure in train if measure.loss is not None and not math.isfinite(measure.loss)),
        unit=unit or Summary().loss_unit,
    )


def _points(measures: Sequence[MetricsLine], value: Callable[[MetricsLine], float | None]) -> Points:
    points = ((measure.step, value(measure)) for measure in measures)
    return [(step, y) for step, y in points if y is not None and math.isfinite(y)]


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


def _epochs(metrics: Sequence[MetricsLine]) -> list[tuple[int, float]]:
    """Where each epoch ended, between two logged steps in proportion."""
    known = [(measure.epoch, float(measure.step)) for measure in metrics if measure.epoch is not None]
    ends = []
    for (earlier, left), (later, right) in pairwise([(0.0, 0.0), *sorted(known)]):
        for epoch in range(math.floor(earlier) + 1, math.floor(later) + 1):
            ends.append((epoch, left + (right - left) * (epoch - earlier) / (later - earlier)))
    return ends


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
    if (metric := data.metric) is not None and data.scores:
        # Of several that are equally good the one that was kept.
        step, best = min(data.scores, key=lambda point: (metric.cost(point[1]), point[0] != data.best_step))
        side = "highest" if metric.higher_is_better else "lowest"
        parts.append(f"The {side} validation {metric.label} is {words.figure(metric, best)}, at step {step}.")
    return " ".join(parts)
