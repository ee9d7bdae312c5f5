"""What is handed over: a run's model with its adapter and all that belongs to it, and what the user wants of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab import tasks
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.data.forms import read_examples
from trimtab.data.rows import Source as Rows
from trimtab.data.sources import is_local, name_of
from trimtab.errors import DataError, RunError
from trimtab.evaluation.agreement import ROWS, Comparison, Passages
from trimtab.models.locate import ModelHead, Source
from trimtab.notes import Notes, rows as counted
from trimtab.runs.checkpoints import numbered
from trimtab.runs.folder import RunFolder
from trimtab.runs.load import base_of_run, head_of, is_run, load_finite, load_fitting, load_run, load_run_model
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
        return base_of_run(self.folder, self.config)

    def made_of(self) -> Iterator[tuple[Path, str]]:
        """What the run cannot do without, and where it lies."""
        if self.source.kind != "hub":
            yield Path(self.source.location), "the model that the run was trained on"
        if self.config.adapter is not None:
            first = Path(self.config.adapter)
            yield RunFolder(first).adapter if is_run(first) else first, "the adapter that the run began from"
        yield self.folder.adapter, "the adapter of the run"
        for _, checkpoint in numbered(self.folder.checkpoints):
            yield checkpoint, "a checkpoint of the run"

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
        self.model = load_fitting(self.source, dtype, self.config.model.attention, where="cpu")
        load_finite(self.model, self.folder.adapter)
        self.model.eval()

    @property
    def head(self) -> ModelHead:
        """What the model answers with."""
        return head_of(self.summary)

    @property
    def is_causal(self) -> bool:
        """Whether the model goes on from a text, and has no head or targets of its own."""
        return self.head == ModelHead()

    def comparison(self, notes: Notes) -> Comparison | None:
        """On what outputs are compared: the rows that the user named, or those of the run: its test rows, else its
        validation rows, else its training rows. Where none can be read, which is told, random tokens of a causal
        language model, and nothing of any other."""
        if self.wishes.rows is not None:
            return self._on([Rows(path=str(self.wishes.rows))])
        failed = ""
        for sources in self._own_rows():
            try:
                return self._on(self.config.data.settled(sources))
            except (DataError, OSError) as error:
                failed = failed or str(error).splitlines()[0]
        why = f" ({failed})" if failed else ""
        if not self.is_causal:
            notes.add(f"the run's rows cannot be read, so outputs are not compared; name some by --rows FILE{why}")
            return None
        if failed:
            notes.add(f"the run's rows cannot be read, so outputs are compared on random tokens{why}")
        return Passages.random(self.model).comparison

    def require_causal(self, program: str) -> None:
        """Raise RunError for a model that ``program`` does not run: one with a head or targets of its own."""
        if not self.is_causal:
            kind = self.head.model_class.removeprefix("AutoModelFor")
            raise RunError(
                f"{self.folder.path}: this run trained a model for {kind}, and {program} runs "
                "those that go on from a text; `trimtab export RUN OUT --to merged` hands it over"
            )

    def weighing(self) -> list[dict[str, Tensor]] | None:
        """The rows that the user named, as inputs of the model; None if none are named."""
        if self.wishes.rows is None:
            return None
        found: list[dict[str, Tensor]] = []

        def keep(_model: Any, _arguments: Any, given: dict[str, Any]) -> None:
            found.append({key: value for key, value in given.items() if isinstance(value, Tensor) and key != "labels"})

        watching = self.model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self._on([Rows(path=str(self.wishes.rows))]).of(self.model)
        finally:
            watching.remove()
        return found

    def _own_rows(self) -> Iterator[list[Rows]]:
        data = self.config.data
        validation = data.validation if isinstance(data.validation, tuple) else ()
        for sources in (*data.test.values(), validation, data.train):
            if local := [one for one in sources if is_local(one.path, Path.cwd())]:
                yield local[:4]

    def _examples(self, sources: list[Rows]) -> list[Any]:
        few = [
            one if one.path.endswith("]") else one.model_copy(update={"path": f"{one.path}[:{_FEW}]"})
            for one in sources
        ]
        if self.is_causal:
            return list(read_examples(few, tokenizer=self.tokenizer, root=Path.cwd(), notes=Notes()))
        task = tasks.of_head(self.head)
        return task.known(self.head, task.rows(few, self.tokenizer, Notes()), numbered=False)

    @property
    def _limit(self) -> int:
        length = self.config.data.max_length
        return length if isinstance(length, int) else 1024

    def _on(self, sources: list[Rows]) -> Comparison:
        names, rows = ", ".join(name_of(one.path) for one in sources), self._examples(sources)
        if self.is_causal:
            return Passages.of_rows(rows, self.tokenizer, self._limit, names).comparison
        task, head = tasks.of_head(self.head), self.head
        few = rows[:: max(1, len(rows) // ROWS)][:ROWS]
        length = Job.of(self.config).read_for(head).reading_length

        def of(model: Any) -> Tensor:
            return task.compared(model, self.tokenizer, few, head=head, length=length)

        return Comparison(of, f"{counted(len(few))} of {names}")
