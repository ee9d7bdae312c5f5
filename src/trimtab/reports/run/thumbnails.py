"""Small copies of the pictures that rows are about, held by the page itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from markupsafe import Markup

from trimtab.data.pictures import opened
from trimtab.errors import DataError

SIDE = 72
"""CSS pixels of the longer side."""


def thumbnail(path: str) -> Markup | None:
    """The picture at ``path`` as an image of the page; None where it is not there any more, or is none."""
    if not Path(path).is_file():
        return None
    try:
        image = opened("", path, b"")
    except DataError:
        return None
    kept = io.BytesIO()
    if max(image.size) > 2 * SIDE:  # twice as fine as the page, for screens that are
        image.thumbnail((2 * SIDE, 2 * SIDE))
    width, height = (max(1, round(side * SIDE / max(image.size))) for side in image.size)
    image.save(kept, "png", optimize=True)
    data = base64.b64encode(kept.getvalue()).decode()
    return Markup('<img class="thumbnail" width="{}" height="{}" alt="" src="data:image/png;base64,{}">').format(
        width, height, data
    )
