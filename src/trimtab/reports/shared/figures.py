"""Figures: drawn by matplotlib in the colours of the light page, set into pages as SVG, and written as PNG and SVG.

Inside a page every colour becomes the page's CSS variable of the same name, so that one picture serves a light screen,
a dark one and paper. A picture with a file of its own stands on white in every theme, since it may hold a colour scale
that means something.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from trimtab.errors import printable
from trimtab.files import write_atomically

# As page.css has them for a light screen.
INK, MUTED, LINE, PAGE = "#16202c", "#56637a", "#d8dee6", "#ffffff"
ACCENT, BEFORE, WARM, FAINT = "#1166b0", "#a9b4c2", "#b4500f", "#b0cfea"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAGE: "--page",
    ACCENT: "--accent",
    BEFORE: "--before",
    WARM: "--warm",
    FAINT: "--faint",
}
_PIXELS_PER_INCH = 72


def blank(width: float, height: float) -> Figure:
    """An empty white figure of so many inches, which lays itself out: a picture with a file of its own."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=PAGE)


def screen(width: float, height: float) -> Figure:
    """An empty figure of so many CSS pixels for the middle of a page, where a size is a size on the screen."""
    figure = Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), dpi=_PIXELS_PER_INCH)
    figure.patch.set_visible(False)
    return figure


def plain(axes: Axes, *, size: float = 8, keep: Collection[str] = ("left", "bottom")) -> None:
    """Leave out of the frame what is not read, but for the sides ``keep``, and set the type of the rest."""
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set(visible=side in keep, color=MUTED)
    axes.tick_params(which="both", labelsize=size, colors=MUTED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set(fontsize=size, color=MUTED)
        axis.label.set(fontsize=size + 1, color=MUTED)


def headed(axes: Axes, text: str, *, bold: bool = True) -> None:
    """What a panel shows, above its left end."""
    axes.set_title(text, fontsize=10, color=INK, loc="left", fontweight="bold" if bold else "normal")


def write(axes: Axes, x: float, y: float, text: str, **how: Any) -> Any:
    """Text at a place of the data, in the ink of the page unless ``how`` says otherwise."""
    return axes.annotate(text, (x, y), annotation_clip=False, **{"fontsize": 8.5, "color": INK, **how})


class Label(NamedTuple):
    """The name of something at ``y``; ``x`` is where it stands, None being the right edge of the axes."""

    text: str
    y: float
    x: float | None = None
    colour: str = INK
    bold: bool = False


def labels_beside(
    axes: Axes, labels: Sequence[Label], *, gap: float = 0.055, joined: bool = True, size: float = 8.5
) -> None:
    """Names in a column right of the axes, in the order of what they name and kept apart.

    ``gap`` is the least distance of two names, as a share of the axes' height; ``joined``: a thin line leads from each
    name to what it names.
    """
    low, high = axes.get_ylim()
    ordered = sorted(labels, key=lambda label: label.y)
    for label, height in zip(ordered, apart([(one.y - low) / (high - low) for one in ordered], gap), strict=True):
        type_ = {"color": label.colour, "fontweight": "bold" if label.bold else "normal", "fontsize": size}
        if not joined:
            where = {"xycoords": "axes fraction", "xytext": (8, 0), "textcoords": "offset points"}
            write(axes, 1, height, label.text, va="center_baseline", **where, **type_)
            continue
        write(
            axes,
            1 if label.x is None else label.x,
            label.y,
            label.text,
            xycoords=axes.get_yaxis_transform() if label.x is None else "data",
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            arrowprops={
                **{"arrowstyle": "-", "relpos": (0, 0.5), "color": MUTED, "alpha": 0.6, "linewidth": 0.8},
                **{"shrinkA": 0, "shrinkB": 0 if label.x is None else 4, "zorder": 0},
            },
            **type_,
        )


def apart(heights: Sequence[float], gap: float) -> list[float]:
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


def named_rows(axes: Axes, names: Sequence[str], count: int) -> None:
    """Names in place of an axis for ``count`` rows, the first on top; no names where the panel to the left has them."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelsize=8.5, colors=INK, length=0)
    axes.set_ylim(count - 0.4, -0.6)
    axes.spines["left"].set_visible(False)


def at_row(axes: Axes, place: int, text: str, *, bold: bool = False) -> None:
    """What the row ``place`` comes to, right of the axes."""
    where = {"xycoords": ("axes fraction", "data"), "va": "center", "fontweight": "bold" if bold else "normal"}
    write(axes, 1.02, place, text, **where)


def svg(drawn: Figure, name: str, label: str) -> Markup:
    """The figure as an ``<svg>`` element for the middle of a page; ``label`` tells it to who cannot see it.

    ``name`` must be unique in the page: it keeps the ids of one picture apart from those of the others.
    """
    text = _saved(drawn, "svg", **{"svg.fonttype": "none", "path.simplify": False}).decode()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box, "matplotlib gives every SVG a viewBox"
    inner = text[text.index(">", box.end()) + 1 : text.rindex("</svg>")]
    # A <style> inside an inline SVG would hold for the whole page; the page's own style sheet says the same.
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = inner.replace("xlink:href", "href")
    inner = re.sub(r'\bid="', f'id="{name}-', inner)
    inner = re.sub(r'(url\(|href=")#', rf"\1#{name}-", inner)
    # The page's font at matplotlib's size and weight, in the two forms that its versions write.
    inner = re.sub(r"font-family: [^;\"]*;? ?", "", inner)
    inner = re.sub(r"font: ((?:\w+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", inner)
    for colour, variable in VARIABLES.items():
        inner = inner.replace(colour, f"var({variable})")
    inner = re.sub(r">\s+<", "><", inner)
    # As wide as the PNG of the same figure.
    width = float(box.group(1).split()[2]) * drawn.dpi / _PIXELS_PER_INCH
    return Markup(
        f'<svg class="plot" viewBox="{box.group(1)}" style="max-width: {width:g}px" role="img" '
        f'aria-label="{escape(label)}">{inner}</svg>'
    )


def write_picture(figure: Figure, folder: Path, name: str, label: str) -> Markup:
    """Write ``NAME.png`` and ``NAME.svg`` into ``folder``; give the ``<figure>`` for a page, ``label`` being what it
    says to who cannot see it."""
    for suffix in ("png", "svg"):
        data = _saved(figure, suffix)
        write_atomically(folder / f"{name}.{suffix}", lambda path, data=data: path.write_bytes(data))  # type: ignore[misc]
    return Markup('<figure class="picture" tabindex="0">{}</figure>').format(svg(figure, name, label))


def _saved(figure: Figure, form: str, **settings: Any) -> bytes:
    """The file that holds ``figure``; the same figure gives the same bytes."""
    for text in figure.findobj(Text):
        if (said := text.get_text()) and not said.startswith("$\\mathdefault"):  # which the ticks of log scales are
            text.set_text(printable(said))
            text.set_parse_math(False)  # a name with two $ is no formula
    buffer = io.BytesIO()
    rc: Any = {"svg.hashsalt": "trimtab", **settings}
    with matplotlib.rc_context(rc):
        figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()
