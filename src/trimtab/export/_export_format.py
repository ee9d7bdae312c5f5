"""What a format to hand a model over in is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.models.locate import Source


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
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path | str,
        *,
        overwrite: bool = False,
        base: Source | None = None,
        chat: bool = False,
    ) -> list[str]:
        """Write ``model`` and ``tokenizer`` to ``out``, whole or not at all; gives what the user should know of it.

        Args:
            overwrite: replace what is there.
            base: where the model came from; what it has besides weights is handed on, if the format can hold it.
            chat: the model was trained on conversations, so that its texts end as its chat template ends a turn.

        Raises ModelError as ``check_target`` does, if the disk does not take it, or if the format cannot hold it.
        """
