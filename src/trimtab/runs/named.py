"""What a user named, a run or a model by itself: found before any of its weights is read, then loaded to be used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.adapters.formats import file_names
from trimtab.adapters.placing import adapter_files, read_adapter
from trimtab.adapters.stored_head import read_head
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.data.rows import Source as RowSource
from trimtab.data.sources import rows_of
from trimtab.errors import AdapterError, ConfigError, ModelError, RunError
from trimtab.hints import pasted
from trimtab.machine import best_precision
from trimtab.models.heads import head_for, head_modules, own_head
from trimtab.models.load import drawn_modules, empty_model
from trimtab.models.locate import ModelHead, Source, locate
from trimtab.models.model_files import ModelFiles, load_config_only
from trimtab.runs.folder import RunFolder
from trimtab.runs.load import (
    base_of_run,
    changes_in,
    doubt_of,
    is_run,
    load_finite,
    load_fitting,
    load_run_model,
    with_tokens_of,
)
from trimtab.runs.records import Summary
from trimtab.surgery.adapted import adapted_modules


@dataclass(frozen=True)
class Named:
    """The model that a user named, by a run or by itself.

    Attributes:
        name: as it was given.
        source: where the model comes from, with what it is read for.
        adapter: the folder of what is put onto it; None for the bare model.
        run: the run's folder, its configuration and its summary, if it was one.
    """

    name: str
    source: Source
    adapter: Path | None = None
    run: RunFolder | None = None
    config: RunConfig | None = None
    summary: Summary | None = None

    @classmethod
    def find(cls, name: str, *, adapter: Path | None = None, base: bool = False) -> Named:
        """The run whose folder is ``name``, else the model of that name.

        Args:
            adapter: to put onto a model; a run has its own.
            base: leave the adapter of a run off.

        Raises ConfigError if the arguments contradict each other, RunError for a folder that is neither, ModelError
        for a model that has nothing to answer with, and AdapterError as reading an adapter does.
        """
        if is_run(Path(name)):
            if adapter is not None:
                raise ConfigError("--adapter goes with the name of a model; a run has its own adapter")
            run = RunFolder(Path(name))
            config, summary = load_config(run.config), run.read_summary()
            source = base_of_run(run, config)
            return cls(name, source, None if base else run.adapter, run, config, summary=summary)
        if base:
            raise ConfigError("--base goes with a run; a model named as it is has no adapter")
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            if any((Path(name) / one).is_file() for one in file_names()):
                raise RunError(f"{name}: an adapter without its model; name the model, and this folder by --adapter")
            raise RunError(
                f"{name}: not a run folder (it has no config.yaml), and not a model's (it has no config.json); name "
                "the output of trimtab finetune, or a model"
            )
        source = with_tokens_of(adapter, locate(name))
        return cls(name, replace(source, head=_head(source, adapter)), adapter)

    @property
    def head(self) -> ModelHead:
        """What the model answers with."""
        return self.source.head

    @property
    def form(self) -> str | None:
        """The form of the run's rows; None without a run, or where it is not known."""
        return self.summary.form if self.summary is not None else None

    @property
    def doubt(self) -> str | None:
        """What the user should know of the adapter, where it was made for another model than this one is, or is
        another than the run's."""
        if self.adapter is None:
            return None
        if self.run is None:
            return doubt_of(self.adapter, self.source)
        return "; ".join(changes_in(self.run, self.source)) or None

    def require_writer(self) -> None:
        """Raise ConfigError, which names the right verb, unless the model goes on from a text."""
        if self.head.model_class != ModelHead().model_class:
            says = "an encoder and a decoder that write a target" if not self.head.problem else "a head for its answers"
            raise ConfigError(
                f"{self.name}: this model does not go on from a text, it has {says}; ask it with "
                f"{pasted('predict', self.name)} ..."
            )

    def source_of_rows(self, path: str) -> RowSource:
        """The rows at ``path``, read with the columns that the run's rows have, as far as these have them too."""
        plain = RowSource(path=path)
        columns = self.config.data.columns if self.config is not None else {}
        first = next(rows_of(plain, root=Path.cwd())).value if columns else {}
        alike = {key: column for key, column in columns.items() if key not in first and column.split(".")[0] in first}
        return plain.model_copy(update={"columns": alike})

    def reader(self) -> Any:
        """The tokenizer, or the image processor."""
        return ModelFiles(self.source).reader

    def load(self) -> Any:
        """The model with its adapter, in eval mode.

        Raises ModelError for a head that neither the model's files nor the adapter have: its answers would be by
        chance. Raises whatever loading raises.
        """
        if self.run is not None and self.config is not None:
            return load_run_model(self.run, self.config, adapter=self.adapter is not None)
        lacking = set(drawn_modules(self.source, empty_model(self.source))) if self.head.problem else set()
        if lacking and self.adapter is None:
            named = ", ".join(sorted(lacking))
            raise ModelError(f"{self.name}: its files lack {named}, so it has no head to answer with")
        # bfloat16 tells numbers around 1000 apart only by 4.
        precision = "float32" if self.head.problem == "regression" else best_precision()
        model = load_fitting(self.source, precision)
        if self.adapter is not None:
            load_finite(model, self.adapter)
            if lacking := lacking - {name for name, _ in adapted_modules(model)}:
                raise AdapterError(
                    f"{self.adapter}: it lacks {', '.join(sorted(lacking))}, and so does {self.name}; save the adapter "
                    "with the head that it was trained with (PEFT's modules_to_save)"
                )
        return model.eval()


def _head(source: Source, adapter: Path | None) -> ModelHead:
    """What the model of ``source`` answers with: what its adapter was trained for, else its own head."""
    own = ModelHead() if source.kind == "gguf" else own_head(load_config_only(source))
    said = read_head(*adapter_files(adapter)) if adapter is not None else None
    if said is None or (not said.problem and own is not None and own.model_class == said.model_class):
        if own is None:
            raise ModelError(
                f"{source.name}: an encoder without a head to answer with; fine-tune it on rows of your task (trimtab "
                "init), or name the adapter that has one (--adapter)"
            )
        return own
    if said.problem or not said.model_class.endswith("Classification"):
        return ModelHead(said.model_class, said.problem, said.labels)
    return head_for(said.model_class, [f"LABEL_{number}" for number in range(_rows_of_head(source, adapter, said[0]))])


def _rows_of_head(source: Source, adapter: Path | None, model_class: str) -> int:
    """How many labels the head has that is stored with an adapter of PEFT's."""
    assert adapter is not None
    stored = read_adapter(adapter)
    for name in reversed(head_modules(empty_model(replace(source, head=ModelHead(model_class))))):
        if name in stored and "weight" in (tensors := stored[name].tensors):
            return len(tensors["weight"])
    raise AdapterError(
        f"{adapter}: it has no head, and {source.name} has none either; save the adapter with the head that it was "
        "trained with (PEFT's modules_to_save)"
    )
