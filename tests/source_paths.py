"""What a configuration says of its rows, as plain paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def paths(sources: Any) -> Any:
    """Of ``data.train`` or ``data.validation`` a tuple of paths; of ``data.test`` a path for each name."""
    if isinstance(sources, Mapping):
        return {name: paths(held)[0] for name, held in sources.items()}
    return tuple(source.path for source in sources)
