"""Pictures: kept apart names, the colours of the page, the same bytes each time."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from trimtab.reports.shared import figures, shell
from trimtab.reports.shared.figures import Label, apart, blank, labels_beside, svg, write_picture

STYLE = (Path(shell.__file__).parent / "page.css").read_text(encoding="utf-8")


def test_every_colour_is_that_of_the_light_page() -> None:
    light = STYLE[: STYLE.index("@media")]
    assert {variable: colour for colour, variable in figures.VARIABLES.items()}.items() <= dict(
        re.findall(r"(--[a-z]+): (#[0-9a-f]{6});", light)
    ).items()


@pytest.mark.parametrize("seed", range(5))
def test_heights_are_apart_and_in_order_and_no_more_moved_than_needed(seed: int) -> None:
    heights = np.sort(np.random.default_rng(seed).uniform(0, 1, 9)).tolist()
    moved = apart(heights, 0.08)
    # The gap is exact but for the rounding of a handful of additions.
    assert all(upper - lower >= 0.08 - 1e-12 for lower, upper in pairwise(moved))
    assert min(moved) >= 0
    assert max(moved) <= 1
    assert apart(moved, 0.08 - 1e-9) == pytest.approx(moved, abs=1e-12), "what is apart already stays"


def test_two_names_that_touch_give_way_to_both_sides() -> None:
    assert apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert apart([0.0, 0.0, 0.9], 0.1) == pytest.approx([0.0, 0.1, 0.9])


@pytest.mark.parametrize("joined", [True, False])
def test_names_stand_in_the_order_of_what_they_name(joined: bool) -> None:
    axes = blank(4, 3).subplots()
    axes.set_ylim(0, 10)
    labels_beside(axes, [Label("high", 9.0, 1.0), Label("low", 1.0), Label("lower", 0.9)], joined=joined)
    assert [text.get_text() for text in axes.texts] == ["lower", "low", "high"]


def test_a_picture_is_written_as_files_and_comes_back_for_the_page(tmp_path: Path) -> None:
    def draw() -> str:
        figure = blank(4, 3)
        figure.subplots().plot([1, 2], [1, 3], color=figures.ACCENT)
        return write_picture(figure, tmp_path, "line", 'a "line"')

    first = draw()
    files = {name: (tmp_path / name).read_bytes() for name in ("line.png", "line.svg")}
    assert first == draw(), "the same figure gives the same picture"
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    assert "var(--accent)" in first
    assert figures.ACCENT not in first
    assert figures.ACCENT.encode() in files["line.svg"], "a file has no page to take its colours from"
    assert 'aria-label="a &#34;line&#34;"' in first
    assert f"max-width: {4 * 150}px" in first, "as wide as the PNG"


def test_ids_of_two_pictures_in_a_page_differ() -> None:
    ids = []
    for name in ("one", "two"):
        figure = blank(4, 3)
        figure.subplots().plot([1, 2], [1, 3])
        ids.append(set(re.findall(r'\bid="([^"]+)"', svg(figure, name, "a line"))))
    assert ids[0]
    assert not ids[0] & ids[1]
