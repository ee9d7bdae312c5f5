"""The formats in which a whole model is handed over. One file is one format; a new file here is found by itself.

Each file defines one class derived from ``ExportFormat`` (`_export_format.py`), and its name is the format's name.
"""

from __future__ import annotations

from trimtab import listing
from trimtab.errors import ModelError, did_you_mean
from trimtab.export._export_format import ExportFormat

__all__ = ["ExportFormat", "export_format", "names"]


def names() -> list[str]:
    """The names of all formats, sorted."""
    return listing.names(__path__)


def export_format(name: str) -> ExportFormat:
    """The format called ``name``. Raises ModelError for an unknown name."""
    known = names()
    if name not in known:
        near = did_you_mean(name, known)
        raise ModelError(f"unknown export format '{name}': expected one of {', '.join(known)}.{near}")
    return listing.class_in(__name__, name, ExportFormat)()  # type: ignore[type-abstract]
