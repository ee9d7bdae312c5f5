"""Several adapters on disk, of runs or in folders of their own, as one folder."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.formats import all_formats
from trimtab.adapters.placing import adapter_files, format_of, local_folder
from trimtab.adapters.store import load_adapter, save_adapter
from trimtab.adapters.stored_head import read_head
from trimtab.errors import ConfigError, ModelError, RunError, TrimtabWarning
from trimtab.export._card import base_of
from trimtab.export._hand_over import write_whole
from trimtab.export._older_names import save_tokenizer
from trimtab.files import read_json, write_json, write_text
from trimtab.models.model_files import load_config_only
from trimtab.runs.load import is_run, load_fitting, load_run_model, with_tokens_of
from trimtab.runs.named import Named
from trimtab.surgery.combine import combine
from trimtab.surgery.conversion_report import CombinationReport
from trimtab.surgery.sums import How

REPORT = "combination.json"


@dataclass(frozen=True)
class Ingredient:
    """One adapter and its weight: the folder of a run, or of an adapter; a hub id."""

    place: str
    weight: float

    @classmethod
    def read(cls, said: str) -> Ingredient:
        """``FOLDER:0.7``, or ``FOLDER`` alone for a weight of 1. Raises ConfigError for a weight that is no number."""
        place, colon, number = said.rpartition(":")
        if not colon or Path(said).exists():
            return cls(said, 1.0)
        try:
            return cls(place, float(number))
        except ValueError:
            raise ConfigError(
                f"{said}: expected an adapter and its weight, such as {place}:0.7; '{number}' is no number"
            ) from None

    @property
    def adapter(self) -> Path:
        """The folder of the adapter's files."""
        if is_run(Path(self.place)):
            run = Named.find(self.place)
            if run.run is None or not run.run.has_adapter:
                raise RunError(f"{self.place}: this run has no adapter yet; let it finish first")
            return run.run.adapter
        return local_folder(self.place)


def combine_folders(
    said: Sequence[str],
    out: Path,
    *,
    model: str | None = None,
    how: How = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[CombinationReport, str]:
    """Combine the adapters that are ``said`` (`Ingredient.read`) as `trimtab.combine` does, and write the new one to
    ``out``, whole or not at all, with the tokenizer, a report and a card. Gives the report, and the name of the format
    that it is written in.

    ``model``: the model that all of them were trained on; None: the first run's, or what the folders say.

    Raises:
        ConfigError: one is named twice, they say different models, or their heads have different labels.
        ModelError: ``out`` holds something that may not be replaced, or the machine does not take it.
        SurgeryError, AdapterError, RunError: as combining and loading raise them.
    """
    parts = [Ingredient.read(one) for one in said]
    if len({part.place for part in parts}) < len(parts):
        raise ConfigError(f"{' '.join(said)}: an adapter is named twice; give it once, with the sum of its weights")
    target = _checked(out, overwrite=overwrite)
    folders = [part.adapter for part in parts]
    for folder in folders:
        format_of(folder)  # says what is wrong before a model is loaded
    _require_labels(parts, folders)
    named = _base(parts, folders, model)
    for folder in folders:
        with_tokens_of(folder, named.source)  # that all mean one word by one number
    for part in parts:
        if is_run(Path(part.place)) and (doubt := Named.find(part.place).doubt) is not None:
            warnings.warn(doubt, TrimtabWarning, stacklevel=2)
    reader, loaded = named.reader(), _load(named)
    names = {part.place: part.weight for part in parts}
    new = next(name for name in map("combined {}".format, itertools.count()) if name not in names)
    for part, folder in zip(parts, folders, strict=True):
        load_adapter(loaded, folder, part.place)
    report = combine(loaded, names, new, how, rank=rank, density=density, seed=seed)
    label: list[str] = []

    def fill(folder: Path) -> None:
        save_adapter(loaded, folder, new)
        label.append(format_of(folder).label or "trimtab")
        config = folder / all_formats()[0].files[0]
        if config.is_file():
            known = base_of(named.source)
            write_json(config, read_json(config) | {"base_model_name_or_path": known})
        save_tokenizer(reader, folder)
        of = {name: part.weight for name, part in zip(_names(parts), parts, strict=True)}
        write_json(folder / REPORT, {"of": of, **report.plain()})
        write_text(folder / "README.md", _card(target.name, parts, named, report))

    def needed() -> int:
        return sum(one.nbytes for one in loaded.state_dict().values() if one.requires_grad)

    write_whole(target, fill, needed, overwrite=overwrite)
    return report, label[0]


def _checked(out: Path, *, overwrite: bool) -> Path:
    """The absolute path of ``out``, if an adapter may be written there."""
    target = out.absolute()
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target}: expected a folder to write the adapter to, found a file")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ModelError(f"{target}: not empty. Name a new folder, or allow it to be replaced (--overwrite)")
        if not (target / REPORT).is_file():
            raise ModelError(f"{target}: holds something other than a combined adapter, so it is not overwritten")
    return target


def _require_labels(parts: Sequence[Ingredient], folders: Sequence[Path]) -> None:
    """Raise ConfigError unless the rows of all heads mean the same labels."""
    heads = [read_head(*adapter_files(folder)) for folder in folders]
    told = {part.place: head.labels for part, head in zip(parts, heads, strict=True) if head and head.labels}
    if len(set(told.values())) > 1:
        raise ConfigError(
            "the heads of the adapters have different labels ("
            + "; ".join(f"{place}: {', '.join(labels[:20])}" for place, labels in told.items())
            + "), so a sum of them would mean none of these; combine runs of the same labels in the same order "
            "(data.choices)"
        )


def _base(parts: Sequence[Ingredient], folders: Sequence[Path], model: str | None) -> Named:
    """The model that the adapters belong on. Raises ConfigError where they say different ones, or none."""
    runs = {part.place: Named.find(part.place, base=True) for part in parts if is_run(Path(part.place))}
    quantised = {run.config.quantisation for run in runs.values() if run.config is not None}
    if len(quantised) > 1:
        raise ConfigError(
            f"the runs trained on weights that are quantised in different ways ({', '.join(sorted(quantised))}), so "
            "their changes are changes of different weights; combine runs of one kind"
        )
    if model is not None:
        return _found(model, folders[0])
    told = {place: base_of(run.source) for place, run in runs.items()}
    for part, folder in zip(parts, folders, strict=True):
        if part.place not in told and (base := _said_by(folder)):
            told[part.place] = base
    if len({name.replace("\\", "/").rpartition("/")[2].lower() for name in told.values()}) > 1:
        raise ConfigError(
            "the adapters say that they belong on different models ("
            + ", ".join(f"{place}: {base}" for place, base in told.items())
            + "). If these are one, name it: --model MODEL"
        )
    if runs:  # the one with the most tokens has those of the others, or they do not fit together
        return max(runs.values(), key=lambda one: len(one.source.add_tokens))
    if not told:
        raise ConfigError("none of these adapters says which model it belongs on; name it: --model MODEL")
    return _found(next(iter(told.values())), folders[0])


def _found(model: str, folder: Path) -> Named:
    """The model of that name, with the tokens and the head that the adapter in ``folder`` was trained with."""
    if is_run(Path(model)):
        return Named.find(model, base=True)
    return Named.find(model, adapter=folder)


def _said_by(folder: Path) -> str | None:
    """The model that the adapter in ``folder`` says it was made for, as it says it."""
    description = read_json(folder / format_of(folder).files[0])
    said = description.get("base_model_name_or_path", description.get("base"))
    return said if isinstance(said, str) and said else None


def _load(named: Named) -> Any:
    if named.run is not None and named.config is not None:
        return load_run_model(named.run, named.config, adapter=False)
    # In the dtype of its files: what a magnitude makes of a weight hangs on that weight.
    own = None if named.source.kind == "gguf" else getattr(load_config_only(named.source), "dtype", None)
    dtype = str(own).removeprefix("torch.") if own in (torch.bfloat16, torch.float16) else "float32"
    return load_fitting(named.source, dtype).eval()


def _names(parts: Sequence[Ingredient]) -> list[str]:
    """What each is called in the folder: by the end of its path that tells it from the others."""
    ends = [Path(part.place).absolute().parts for part in parts]
    long = max(map(len, ends))
    length = next((one for one in range(1, long) if len({end[-one:] for end in ends}) == len(ends)), 1)
    return ["/".join(end[-length:]) for end in ends]


def _card(name: str, parts: Sequence[Ingredient], named: Named, report: CombinationReport) -> str:
    of = "\n".join(f"- {name}: weight {part.weight:g}" for name, part in zip(_names(parts), parts, strict=True))
    error = "exact to rounding" if report.how == "linear" else f"relative error {report.error:.1e}"
    return (
        f"# {name}\n\nAn adapter of {base_of(named.source)}, combined with "
        f"[trimtab](https://pypi.org/project/trimtab/) {metadata.version('trimtab')} ({report.how}; {error}) of:"
        f"\n\n{of}\n\n`{REPORT}` has the error of each module.\n"
    )
