"""Plots as inline SVG: drawn by matplotlib, coloured by the page.

No colour is drawn as itself. Each is a placeholder that becomes a CSS variable, so that one picture serves a light
screen, a dark one and paper. A figure's unit is the CSS pixel (72 to matplotlib's inch), so that a size here is a size
on the screen. No text from data is ever drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# placeholder -> CSS variable of report.css
INK, MUTED, LINE, PAGE = "#010101", "#020202", "#030303", "#040404"
AFTER, BEFORE, VALIDATION, RAW = "#050505", "#060606", "#070707", "#080808"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAGE: "--page",
    AFTER: "--accent",
    BEFORE: "--before",
    VALIDATION: "--warm",
    RAW: "--faint",
}

PIXEL = 1 / 72
_TEXT = 12.0


def figure(width: float, height: float) -> Figure:
    """An empty figure of that many CSS pixels."""
    made = Figure(figsize=(width * PIXEL, height * PIXEL), dpi=72)
    made.patch.set_visible(False)
    return made


def bare(axes: Axes, *, keep: Sequence[str] = ("bottom",)) -> None:
    """Leave out the frame but for ``keep``, and set the type of what remains."""
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(LINE)
    axes.tick_params(length=0, labelsize=_TEXT, colors=MUTED, pad=5)


def write(axes: Axes, x: float, y: float, text: str, **how: Any) -> Any:
    """Text at a place of the data, in the ink of the page unless ``how`` says otherwise."""
    return axes.annotate(text, (x, y), annotation_clip=False, **{"fontsize": _TEXT, "color": INK, **how})


def svg(drawn: Figure, name: str, label: str) -> Markup:
    """The figure as an ``<svg>`` element for the middle of a page; ``label`` tells it to who cannot see it.

    ``name`` must be unique in the page: it keeps the ids of one picture apart from those of the others.
    """
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "trimtab", "path.simplify": False}
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        FigureCanvasSVG(drawn).print_svg(buffer)
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box, "matplotlib gives every SVG a viewBox"
    inner = text[text.index(">", box.end()) + 1 : text.rindex("</svg>")]
    # The metadata holds the time of drawing.
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    # A <style> inside an inline SVG would hold for the whole page; the page's own style sheet says the same.
    inner = re.sub(r"<style.*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = inner.replace("xlink:href", "href")
    inner = re.sub(r'\bid="', f'id="{name}-', inner)
    inner = re.sub(r'(url\(|href=")#', rf"\1#{name}-", inner)
    # The page's font at matplotlib's size and weight, in the two forms that its versions write.
    inner = re.sub(r"font-family: [^;\"]*;? ?", "", inner)
    inner = re.sub(r"font: ((?:\w+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", inner)
    for placeholder, variable in _VARIABLES.items():
        inner = inner.replace(placeholder, f"var({variable})")
    inner = re.sub(r">\s+<", "><", inner)
    width = box.group(1).split()[2]
    return Markup(
        f'<svg class="plot" viewBox="{box.group(1)}" style="max-width: {float(width):g}px" role="img" '
        f'aria-label="{escape(label)}">{inner}</svg>'
    )


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
    drawn = figure(360, height)
    axes = drawn.add_axes((52 / 360, 24 / height, 252 / 360, 34 * len(bars) / height))
    bare(axes, keep=())
    axes.set_xlim(0, 100)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.tick_params(axis="y", colors=INK)
    axes.xaxis.grid(True, color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    for place, (title, share, (low, high)) in enumerate(bars):
        colour = BEFORE if title == "before" else AFTER
        axes.barh(place, 100 * share, height=0.6, color=colour, linewidth=0, zorder=2)
        axes.plot([100 * low, 100 * high], [place, place], color=INK, linewidth=1.5, zorder=4, solid_capstyle="butt")
        write(
            axes,
            100 * high,
            place,
            f"{100 * share:.1f} %",
            xytext=(7, 0),
            textcoords="offset points",
            va="center_baseline",
            fontweight="bold",
            fontsize=_TEXT + 1,
            zorder=5,
            bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 1.5},
        )
    if baseline is not None:
        called, share = baseline
        axes.axvline(100 * share, color=INK, linewidth=1.5, linestyle=(0, (4, 3)), zorder=3)
        side = "left" if share < 0.3 else "right" if share > 0.75 else "center"
        write(
            axes,
            100 * share,
            -0.5,
            f"{called} {100 * share:.1f} %",
            xytext=(0, 6),
            textcoords="offset points",
            ha=side,
            va="baseline",
        )
    return svg(drawn, name, label)
