"""Writes what a run trained in a format, whole or not at all, and says how far it is from the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from trimtab.errors import ConfigError, ModelError, machine_refusal
from trimtab.evaluation.agreement import Agreement, agreement
from trimtab.export._card import base_of, card
from trimtab.export._export_format import ExportFormat, Written
from trimtab.export._subject import Subject, Wishes
from trimtab.files import write_folder, write_text
from trimtab.models.model_files import quiet_transformers
from trimtab.notes import Notes
from trimtab.runs.load import changes_in


@dataclass(frozen=True)
class Handed:
    """What was handed over.

    Attributes:
        out: the folder.
        done: what was done, a sentence each.
        agreement: how far what was written is from the run; None where there were no rows to compare them on.
        notes: what the user should know of it, a sentence each.
    """

    out: Path
    done: list[str]
    agreement: Agreement | None
    notes: list[str]


def hand_over(
    form: ExportFormat,
    run: Path,
    out: Path,
    wishes: Wishes,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Handed:
    """Write the run at ``run`` to ``out`` in ``form``, with a model card (README.md).

    The folder appears whole or not at all. With ``overwrite`` it replaces a folder of the same format, and nothing
    else; files of others in it stay. ``progress`` is called where a format works on modules one by one, with the number
    done and of all.

    Raises:
        ConfigError: something is wished for that the format does not know.
        ModelError: ``out`` is a file, or a folder that holds something; or it cannot be written.
        RunError, AdapterError and SurgeryError: as loading, merging and converting raise them.
    """
    for name in wishes.said():
        if name not in form.takes | {"rows"}:
            raise ConfigError(f"--{name} means nothing in this format ({form.summary}); leave it out")
    target = form.check_target(out, overwrite=overwrite)
    subject = Subject.load(run, wishes)
    subject.progress = progress
    _require_apart(target, subject)
    form.check(subject)
    notes = Notes()
    for changed in changes_in(subject.folder, subject.source):
        notes.add(changed)
    comparison = subject.comparison(notes)
    before = comparison.of(subject.model) if comparison is not None else None
    form.prepare(subject)
    written: list[Written] = []
    found: list[Agreement] = []

    def fill(folder: Path) -> None:
        made = form.fill(subject, folder)
        if form.relation == "adapter":
            made = replace(made, notes=[*made.notes, *_apart_from_the_base(form, subject)])
        written.append(made)
        if comparison is not None and before is not None:
            found.append(agreement(before, comparison.of(subject.model), comparison))
        text = card(form, subject, written[0], next(iter(found), None), name=target.name)
        write_text(folder / "README.md", text)

    def needed() -> int:
        return sum(tensor.nbytes for tensor in subject.model.state_dict().values())

    write_whole(target, fill, needed, overwrite=overwrite)
    return Handed(target, written[0].done, next(iter(found), None), [*written[0].notes, *notes])


def _apart_from_the_base(form: ExportFormat, subject: Subject) -> Iterator[str]:
    """What the user should know of an adapter whose base others load in another form than the run did."""
    quantised = subject.config.quantisation
    if quantised != "none":
        yield (
            f"the run trained beside weights that are quantised ({quantised}), and is compared beside them: beside "
            "other forms of the base its answers are off by the quantisation error. Load the base quantised alike; "
            "or `trimtab export RUN OUT --to merged` hands over both as one"
        )
    if form.library is not None and subject.source.kind == "gguf":
        yield (
            f"the run trained beside the weights of {base_of(subject.source)}, and is compared beside them: beside "
            "the model's folder (BASE) its answers are off by what the file's types round. `trimtab export RUN OUT "
            "--to merged` hands over both as one, and `--to gguf-lora` an adapter for the file"
        )


def _require_apart(target: Path, subject: Subject) -> None:
    """Raise ModelError if writing ``target`` would replace what the run is made of."""
    for place, what in subject.made_of():
        if place.exists() and place.resolve().is_relative_to(target.resolve()):
            raise ModelError(
                f"{target}: holds {what}, which would be gone, and the run could not be used any more. Name another "
                "folder"
            )


_OURS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "README.md", "Modelfile", "*.jinja"),
    *("config.json", "generation_config.json", "adapter_config.json", "trimtab.json", "conversion.json"),
    *("combination.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.*", "merges.txt", "*.model", "preprocessor_config.json", "processor_config.json", "modules.json"),
    *("*sentence*.json", "additional_chat_templates", "[0-9]_*"),
)
"""What a folder of a model or an adapter consists of; everything else in it was put there by others."""


def _is_others(name: str) -> bool:
    return not any(fnmatch(name, pattern) for pattern in _OURS)


def write_whole(target: Path, fill: Callable[[Path], None], needed: Callable[[], int], *, overwrite: bool) -> None:
    """Let ``fill`` write the folder ``target``, which appears whole or not at all.

    Raises ModelError if the machine does not take it (``needed``: about how many bytes that is), or if another process
    wrote there meanwhile, and ``overwrite`` is off.
    """

    def filled(folder: Path) -> None:
        fill(folder)
        if not overwrite and target.is_dir() and any(target.iterdir()):
            raise ModelError(f"{target}: another process wrote here meanwhile, and that stays. Name another folder")

    try:
        with quiet_transformers():
            write_folder(target, filled, replace=True, stays=_is_others)
    except (OSError, SafetensorError) as error:
        refusal = machine_refusal(error, target, needed=needed()) or f"{target}: {error}"
        raise ModelError(f"the model cannot be written: {refusal}. Nothing was left behind") from error
