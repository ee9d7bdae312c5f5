"""The formats of an adapter on disk. One file is one format, and a new file in this folder is found by itself.

Each file defines one subclass of ``AdapterFormat`` (`_adapter_format.py`). No other file names a format.
"""

from __future__ import annotations

from functools import cache

from trimtab import listing
from trimtab.adapters.formats._adapter_format import AdapterFormat

__all__ = ["AdapterFormat", "all_formats", "file_names"]


@cache
def all_formats() -> tuple[AdapterFormat, ...]:
    """Every format, the preferred one first."""
    classes = [listing.class_in(__name__, name, AdapterFormat) for name in listing.names(__path__)]  # type: ignore[type-abstract]
    return tuple(sorted((one() for one in classes), key=lambda one: one.preference))


@cache
def file_names() -> tuple[str, ...]:
    """The names of the files that an adapter of any format may have, each once."""
    return tuple(dict.fromkeys(name for one in all_formats() for name in one.files))
