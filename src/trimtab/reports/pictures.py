"""Pictures for people: PNG and SVG files, and the PNG again inside a page that needs no network.

Dark ink on white, on every screen and on paper, since a colour scale that means something must not change with the
theme.
"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from trimtab.files import write_atomically

INK, MUTED, LINE = "#16202c", "#56637a", "#d5dae2"
STYLE = """.picture { background: #fff; border-radius: 8px; padding: .6rem; }
.picture img { max-width: 100%; height: auto; display: block; margin: 0 auto; }"""


def page(title: str, body: str, style: str = "") -> str:
    """A page that stands alone: ``body`` is HTML, ``title`` plain text, ``style`` what the page adds to ours."""
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{css}
{STYLE}{style}</style>
<body>
{body}</body>
</html>
"""


def blank(width: float, height: float) -> Figure:
    """An empty white figure of so many inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def plain(axes: Axes) -> None:
    """Leave out what is not read, and set the type of the rest."""
    axes.tick_params(labelsize=8, colors=MUTED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set(fontsize=8, color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.xaxis.label.set(fontsize=9, color=MUTED)
    axes.yaxis.label.set(fontsize=9, color=MUTED)


def write_picture(figure: Figure, folder: Path, name: str, label: str) -> str:
    """Write ``NAME.png`` and ``NAME.svg`` into ``folder``; give the ``<figure>`` for a page, ``label`` being what it
    says to who cannot see it."""
    png, svg = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    with matplotlib.rc_context({"svg.hashsalt": "trimtab"}):
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    for suffix, data in (("png", png.getvalue()), ("svg", svg.getvalue())):
        write_atomically(folder / f"{name}.{suffix}", lambda path, data=data: path.write_bytes(data))  # type: ignore[misc]
    source = base64.b64encode(png.getvalue()).decode("ascii")
    alt = html.escape(label, quote=True)
    return f'<figure class="picture"><img alt="{alt}" src="data:image/png;base64,{source}"></figure>'
