"""The points of the learning curves."""

from __future__ import annotations

import re

import numpy as np
import pytest

from trimtab.metrics import METRICS
from trimtab.reports.run.curves import curves, describe, smoothed, thinned
from trimtab.reports.run.run_page import followed, validated
from trimtab.reports.run.run_pictures import draw_curves as draw
from trimtab.runs.records import MetricsLine, Summary


def _train(losses: list[float], **more: float) -> list[MetricsLine]:
    return [MetricsLine(kind="train", step=step, loss=loss, **more) for step, loss in enumerate(losses, start=1)]


def test_smoothing_is_a_mean_and_not_shifted() -> None:
    values = np.random.default_rng(0).normal(size=50)
    points = list(enumerate(values.tolist()))
    result = [y for _, y in smoothed(points, 9)]
    for place in range(4, 46):
        # Both are means of nine doubles; they differ by the order of summation alone.
        assert result[place] == pytest.approx(values[place - 4 : place + 5].mean(), abs=1e-14)
    assert result[0] == values[0]
    assert result[2] == pytest.approx(values[:5].mean(), abs=1e-14)
    assert result[-1] == pytest.approx(values[-5:].mean(), abs=1e-14)


def test_a_straight_line_stays_itself_but_for_its_end() -> None:
    points = [(step, 5.0 - step) for step in range(30)]
    assert np.allclose(smoothed(points, 7)[:27], points[:27], rtol=1e-14)


def test_thinning_keeps_spikes() -> None:
    points = [(step, 1.0) for step in range(10_000)]
    points[7_777] = (7_777, 50.0)
    points[3_333] = (3_333, -50.0)
    kept = thinned(points, 200)
    assert len(kept) <= 200
    assert {(7_777, 50.0), (3_333, -50.0)} <= set(kept)
    assert kept == sorted(kept)


def test_a_loss_that_is_no_number_is_left_out_and_counted() -> None:
    data = curves(_train([1.0, float("nan"), 2.0, float("inf")]), None, None)
    assert data.train == [(1, 1.0), (3, 2.0)]
    assert data.lost == 2
    assert "nan" not in str(draw("x", data, 358, describe(data))).lower()


def test_epochs_end_where_they_end() -> None:
    measures = [MetricsLine(kind="train", step=step, loss=1.0, epoch=step / 16) for step in range(10, 41, 10)]
    assert curves(measures, None, None).epochs == [(1, pytest.approx(16.0)), (2, pytest.approx(32.0))]
    of_one_step = [MetricsLine(kind="train", step=step, loss=1.0, epoch=step) for step in (1, 2)]
    assert curves(of_one_step, None, None).epochs == [(1, 1.0), (2, 2.0)]


def test_one_spike_does_not_flatten_the_rest() -> None:
    data = curves(_train([2.0 + 0.001 * step for step in range(200)] + [500.0] + [2.0] * 99), None, None)
    assert data.limits[1] < 60
    assert data.outside == 1


@pytest.mark.parametrize("losses", [[1.0], [1.0, 1.0], [0.0, 0.0], [5.0] * 30, [1e-9, 1e9]])
@pytest.mark.parametrize("width", [358, 880])
def test_odd_runs_can_be_drawn(losses: list[float], width: int) -> None:
    data = curves(_train(losses, learning_rate=0.0), 1, None)
    assert "<path" in draw("x", data, width, describe(data))


def test_validation_alone_can_be_drawn() -> None:
    data = curves([MetricsLine(kind="validation", step=9, loss=0.7, figures={"accuracy": 1.0})], 9, METRICS["accuracy"])
    assert "kept: 0.700 at step 9" in draw("x", data, 880, describe(data))
    assert (
        describe(data)
        == "The lowest validation loss is 0.700, at step 9. The highest validation accuracy is 100.0 %, at step 9."
    )


@pytest.mark.parametrize(
    ("scores", "title", "sentence"),
    [
        (
            {"macro_f1": (0.25, 0.75)},
            "validation macro F1 (%)",
            "The highest validation macro F1 is 75.0 %, at step 9.",
        ),
        (  # of two that are as good the one that was kept
            {"accuracy": (0.5, 0.5)},
            "validation accuracy (%)",
            "The highest validation accuracy is 50.0 %, at step 9.",
        ),
        ({"perplexity": (3.0, 5.0)}, "validation perplexity", "The lowest validation perplexity is 3.000, at step 4."),
    ],
)
def test_the_validations_are_drawn_by_the_metric_that_they_have(
    scores: dict[str, tuple[float, float]], title: str, sentence: str
) -> None:
    lines = [
        MetricsLine(
            kind="validation", step=step, loss=0.7, figures={name: pair[place] for name, pair in scores.items()}
        )
        for place, step in enumerate((4, 9))
    ]
    data = curves(lines, 9, validated(lines)[0])
    assert describe(data).endswith(sentence)
    assert title in draw("x", data, 880, describe(data))


def _ticks(svg: str, axes: int) -> list[float]:
    """The numbers beside the ticks of the y axis of the panel of that number."""
    panel = re.split(r'<g id="x-axes_\d+">', svg)[axes]
    _, _, upright = panel.partition('<g id="x-matplotlib.axis_')[2].partition('<g id="x-matplotlib.axis_')
    return [float(said.replace("−", "-")) for said in re.findall(r">(−?[\d.]+)</text>", upright)]


def test_correlations_below_zero_are_drawn_the_right_way_up() -> None:
    lines = [
        MetricsLine(kind="validation", step=step, loss=1.0, figures={"pearson": value})
        for step, value in ((1, -0.4), (2, -0.1))
    ]
    svg = draw("x", curves(lines, 2, METRICS["pearson"]), 880, "")
    low, high = -0.4 - 0.2 * 0.3, -0.1 + 0.2 * 0.3
    ticks = _ticks(svg, 2)
    assert ticks
    assert all(low <= tick <= high for tick in ticks)
    heights = [
        float(y) for y in re.findall(r'<use href="#x-m[^"]+" x="[\d.]+" y="([\d.]+)" style="fill: var\(--warm\)', svg)
    ]
    first, last = heights[-2:]
    assert first > last  # up is more


def test_the_validations_are_drawn_by_the_metric_that_chose() -> None:
    checked = [METRICS["rmse"], METRICS["pearson"]]
    assert followed(checked, Summary(settings={"train.metric": "pearson"})) is METRICS["pearson"]
    assert followed(checked, Summary(settings={"train.metric": "loss"})) is METRICS["rmse"]
    assert followed(checked, Summary()) is METRICS["rmse"]
    assert followed([], Summary()) is None


def test_what_ticks_are_multiplied_with_stands_in_the_name_of_the_axis() -> None:
    lines = [MetricsLine(kind="validation", step=step, loss=7e-15 / step, figures={"rmse": 8e-8}) for step in (1, 2)]
    svg = draw("x", curves(lines, 2, METRICS["rmse"], "squared error"), 880, "")
    assert ">loss (squared error) × 1e−15<" in svg
    assert ">1e−15<" not in svg
