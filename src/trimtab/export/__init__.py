"""The formats in which what a run trained is handed over. One file is one format; a new file here is found by itself.

Each file defines one class derived from ``ExportFormat`` (`_export_format.py`). Its name is the format's name, with a
hyphen for an underscore: ``gguf_lora.py`` is ``gguf-lora``.
"""

from __future__ import annotations

from trimtab import listing
from trimtab.errors import ModelError, did_you_mean
from trimtab.export._combined import combine_folders
from trimtab.export._export_format import ExportFormat
from trimtab.export._hand_over import Handed, hand_over
from trimtab.export._subject import Wishes

__all__ = ["ExportFormat", "Handed", "Wishes", "combine_folders", "export_format", "hand_over", "names"]


def names() -> list[str]:
    """The names of all formats, sorted."""
    return [name.replace("_", "-") for name in listing.names(__path__)]


def export_format(name: str) -> ExportFormat:
    """The format called ``name``. Raises ModelError for an unknown name."""
    known = names()
    if name not in known:
        near = did_you_mean(name, known)
        raise ModelError(f"unknown export format '{name}': expected one of {', '.join(known)}.{near}")
    return listing.class_in(__name__, name.replace("-", "_"), ExportFormat)()  # type: ignore[type-abstract]
