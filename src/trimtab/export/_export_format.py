"""What a format to hand a model over in is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ExportFormat(ABC):
    """One way to write a whole model, which carries no adapters any more."""

    summary: ClassVar[str]
    """What it writes, in a few words."""

    @abstractmethod
    def check_target(self, out: Path | str, *, overwrite: bool = False) -> Path:
        """The absolute path of ``out``, if it may be written there. A verb asks before a long computation.

        Raises ModelError if something is there that may not be replaced.
        """

    @abstractmethod
    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path | str, *, overwrite: bool = False
    ) -> None:
        """Write ``model`` and ``tokenizer`` to ``out``, whole or not at all.

        Raises ModelError as ``check_target`` does, if the disk does not take it, or if the format cannot hold it.
        """
