"""What is handed over: a run's model with its adapter and all that belongs to it, and what the user wants of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.config.resolve import source_of
from trimtab.config.run import RunConfig
from trimtab.data.forms import read_examples
from trimtab.data.rows import Example
from trimtab.data.rows import Source as Rows
from trimtab.data.sources import is_local, name_of
from trimtab.data.tokens import encode_all
from trimtab.errors import DataError
from trimtab.evaluation.agreement import Passages
from trimtab.models.locate import Source
from trimtab.notes import Notes
from trimtab.runs.folder import RunFolder
from trimtab.runs.load import load_finite, load_fitting, load_run, load_run_model
from trimtab.runs.records import Summary

_FEW = 64
"""Rows that are read of a file to compare two models on."""


@dataclass(frozen=True)
class Wishes:
    """What the user said of a format.

    Attributes:
        dtype: of the weights that are stored; None: the one that the run trained on.
        onto: which weights the adapter of a quantised run is folded into, as in ``trimtab merge --onto``.
        type: of tensors in a GGUF file; None: each in its own.
        rank: of the LoRA that another method is converted to; None: 32. With ``error`` the most that a module may get.
        error: the relative error that the conversion may make; it chooses the rank of each module.
        rows: a file of rows to compare outputs on, and to weigh a conversion by; None: the run's own.
        gguf: the GGUF file of the run's base, where the run was not trained on it.
        system: a system message for the Modelfile.
    """

    dtype: str | None = None
    onto: str = "dequantised"
    type: str | None = None
    rank: int | None = None
    error: float | None = None
    rows: Path | None = None
    gguf: Path | None = None
    system: str | None = None

    def said(self) -> list[str]:
        """The names of the fields that are not as they are by default."""
        plain = Wishes()
        return [name for name in vars(plain) if getattr(self, name) != getattr(plain, name)]


@dataclass
class Subject:
    """A run that is handed over. ``model`` carries the run's adapter until a format folds it in."""

    folder: RunFolder
    config: RunConfig
    model: Any
    tokenizer: Any
    wishes: Wishes
    summary: Summary | None
    progress: Callable[[int, int], None] | None = None
    """Called with the number of modules done and of all, where a format works on them one by one."""

    @classmethod
    def load(cls, run: Path, wishes: Wishes) -> Subject:
        """The run at ``run`` as it was trained, in the dtype that is wished for. Raises as ``load_run`` does."""
        loaded = load_run(run, dtype=wishes.dtype)
        summary = loaded.folder.read_summary()
        return cls(loaded.folder, loaded.config, loaded.model, loaded.reader, wishes=wishes, summary=summary)

    @property
    def source(self) -> Source:
        """Where the run's base comes from."""
        return source_of(self.config)

    @property
    def chat(self) -> bool:
        """Whether the run trained on conversations."""
        return self.summary is not None and self.summary.form == "chat"

    def load_anew(self, *, dtype: str | None = None, quantised: bool = True) -> None:
        """Load the model again, one at a time in memory; with ``dtype`` its files are read in that one, and not in the
        one that the run trained on."""
        self.model = None
        if dtype is None:
            self.model = load_run_model(
                self.folder, self.config, adapter=True, dtype=self.wishes.dtype, quantised=quantised
            )
            return
        self.model = load_fitting(self.source, dtype, self.config.model.attention)
        load_finite(self.model, self.folder.adapter)
        self.model.eval()

    def passages(self, notes: Notes) -> Passages:
        """On what outputs are compared: the rows that the user named, or those of the run: its test rows, else its
        validation rows, else its training rows. Random tokens, where none can be read, which is told."""
        if self.wishes.rows is not None:
            return self._read([Rows(path=str(self.wishes.rows))], notes)
        failed = ""
        for sources in self._own_rows():
            try:
                return self._read(self.config.data.settled(sources), notes)
            except (DataError, OSError) as error:
                failed = failed or str(error).splitlines()[0]
        if failed:
            notes.add(f"the run's rows cannot be read, so outputs are compared on random tokens ({failed})")
        return Passages.random(self.model)

    def weighing(self) -> list[dict[str, Tensor]] | None:
        """The rows that the user named, as inputs of the model; None if none are named."""
        if self.wishes.rows is None:
            return None
        rows = encode_all(self._examples([Rows(path=str(self.wishes.rows))]), self.tokenizer, self._limit)
        return [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]

    def _own_rows(self) -> Iterator[list[Rows]]:
        data = self.config.data
        validation = data.validation if isinstance(data.validation, tuple) else ()
        for sources in (*data.test.values(), validation, data.train):
            if local := [one for one in sources if is_local(one.path, Path.cwd())]:
                yield local[:4]

    def _examples(self, sources: list[Rows]) -> list[Example]:
        few = [
            one if one.path.endswith("]") else one.model_copy(update={"path": f"{one.path}[:{_FEW}]"})
            for one in sources
        ]
        return list(read_examples(few, tokenizer=self.tokenizer, root=Path.cwd(), notes=Notes()))

    @property
    def _limit(self) -> int:
        length = self.config.data.max_length
        return length if isinstance(length, int) else 1024

    def _read(self, sources: list[Rows], notes: Notes) -> Passages:
        names = ", ".join(name_of(one.path) for one in sources)
        return Passages.of_rows(self._examples(sources), self.tokenizer, self._limit, names)
