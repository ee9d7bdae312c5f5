"""What a format to hand over is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from trimtab.errors import ModelError
from trimtab.export._subject import Subject


@dataclass
class Written:
    """What a format wrote.

    Attributes:
        done: what was done, a sentence each.
        notes: what the user should know of it, a sentence each.
        use: how it is used, as Markdown for the model card.
    """

    done: list[str]
    notes: list[str] = field(default_factory=list)
    use: str = ""


class ExportFormat(ABC):
    """One way to hand over what a run trained, as a folder."""

    summary: ClassVar[str]
    """What it writes, in a few words."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """The fields of `Wishes` that mean something here."""
    marks: ClassVar[tuple[str, ...]]
    """Patterns of files by which a folder of this format is known, so that it may be replaced when told to."""
    compared: ClassVar[str] = "what was written against the run"
    library: ClassVar[str | None]
    """What a model card calls the program that loads it (``library_name``)."""
    relation: ClassVar[str]
    """How a model card calls what it is of its base: ``finetune``, ``adapter`` or ``quantized``."""

    def check_target(self, out: Path | str, *, overwrite: bool = False) -> Path:
        """The absolute path of ``out``, if a folder of this format may be written there. A verb asks before a long
        computation.

        Raises ModelError if ``out`` is a file, or a folder that holds something and may not be replaced.
        """
        target = Path(out).absolute()
        if target.exists() and not target.is_dir():
            raise ModelError(f"{target}: expected a folder to write the model to, found a file.")
        if target.is_dir() and any(target.iterdir()):
            if not overwrite:
                raise ModelError(f"{target}: not empty. Name a new folder, or allow it to be replaced (--overwrite).")
            if not any(next(target.glob(mark), None) for mark in self.marks):
                raise ModelError(f"{target}: holds something other than a model, so it is not overwritten.")
        return target

    def check(self, subject: Subject) -> None:
        """Raise a TrimtabError for what can be seen to be impossible before anything is computed."""
        return

    def prepare(self, subject: Subject) -> None:
        """Called once the run's own outputs are known: load the model anew, where the format starts from other weights
        than those that the run trained on."""
        return

    @abstractmethod
    def fill(self, subject: Subject, folder: Path) -> Written:
        """Write into ``folder``, which is new. ``subject.model`` then computes what was written, so that it can be
        compared with the run.

        Raises a TrimtabError if the format cannot hold what was trained.
        """
