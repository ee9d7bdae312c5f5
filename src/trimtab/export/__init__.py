"""The formats in which a whole model is handed over. One file is one format; a new file here is found by itself.

Each file is a module with the members of ``ExportFormat``, and its name is the format's name.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Protocol, runtime_checkable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.errors import ModelError, did_you_mean


@runtime_checkable
class ExportFormat(Protocol):
    """What a format's file defines."""

    SUMMARY: str
    """What it writes, in a few words."""

    def check_target(self, out: Path | str, *, overwrite: bool = False) -> Path:
        """The absolute path of ``out``, if the format may be written there. A verb asks before a long computation.

        Raises:
            ModelError: something is there that may not be replaced.
        """
        ...

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path | str,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write ``model``, which carries no adapters any more, and ``tokenizer`` to ``out``, whole or not at all.

        Raises:
            ModelError: as ``check_target``, or the disk does not take it, or the format cannot hold such a model.
        """
        ...


def names() -> list[str]:
    """The names of all formats, sorted."""
    return sorted(file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_"))


def export_format(name: str) -> ExportFormat:
    """The format called ``name``. Raises ModelError for an unknown name."""
    if name not in names():
        raise ModelError(
            f"unknown export format '{name}': expected one of {', '.join(names())}.{did_you_mean(name, names())}"
        )
    module = importlib.import_module(f"{__name__}.{name}")
    if not isinstance(module, ExportFormat):
        raise TypeError(f"{module.__name__}: lacks a member of ExportFormat")
    return module
