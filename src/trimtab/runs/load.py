"""A finished run, or a model by itself, loaded to be used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.placing import adapter_files, base_said_by
from trimtab.adapters.store import load_adapter
from trimtab.config.read import load_config
from trimtab.config.resolve import precision_of, source_of
from trimtab.config.run import RunConfig
from trimtab.errors import AdapterError, ModelError, RunError
from trimtab.machine import check_fits, device
from trimtab.models.known_again import mark, model_digest
from trimtab.models.load import empty_model, load_model
from trimtab.models.locate import ModelHead, Source, hub_id
from trimtab.models.model_files import ModelFiles, load_tokenizer
from trimtab.models.quantise import weight_bytes
from trimtab.runs.folder import RunFolder
from trimtab.runs.records import Summary
from trimtab.surgery.carrier import DEFAULT
from trimtab.surgery.names import entries


@dataclass(frozen=True)
class LoadedRun:
    """The model of a run with its adapter, in eval mode, and what belongs to it. The ``reader`` of its rows is a
    tokenizer or an image processor."""

    folder: RunFolder
    config: RunConfig
    model: Any
    reader: Any


def is_run(path: Path) -> bool:
    """Whether ``path`` is the folder of a run."""
    return RunFolder(path).config.is_file()


def load_fitting(
    source: Source, dtype: str, attention: str = "auto", quantisation: str = "none", where: str = "auto"
) -> Any:
    """The model of ``source`` in ``dtype``, its linear layers quantised if so asked, on the device ``where``.

    Raises ModelError if its weights cannot fit into memory, before any is read.
    """
    kind: torch.dtype = getattr(torch, dtype)
    bare = empty_model(source, kind, attention).requires_grad_(False)
    check_fits(f"Loading {source.name} in {dtype}", weight_bytes(bare, quantisation), device(where))
    return load_model(source, kind, attention, quantisation, device(where))


def load_run(path: Path, *, adapter: bool = True, dtype: str | None = None, quantised: bool = True) -> LoadedRun:
    """Load the model of the run at ``path`` as it was trained, in dtype and quantisation, with its adapter unless
    ``adapter`` is off.

    ``quantised``: off to load the original weights in place of quantised ones. ``dtype``: widen (or narrow) the frozen
    weights to this one afterwards; their values are those that were trained on.

    Raises RunError if there is no run, or none that has an adapter yet.
    """
    folder = RunFolder(path)
    if not is_run(path):
        what = "a file" if path.is_file() else "it has no config.yaml"
        raise RunError(f"{path}: not a run folder ({what}); name the output of trimtab finetune")
    config = load_config(folder.config)
    model = load_run_model(folder, config, adapter=adapter, dtype=dtype, quantised=quantised)
    return LoadedRun(folder, config, model, ModelFiles(base_of_run(folder, config)).reader)


def load_run_model(
    folder: RunFolder, config: RunConfig, *, adapter: bool, dtype: str | None = None, quantised: bool = True
) -> Any:
    """The model of ``load_run`` alone, for a caller that has read the rest. Raises as that does."""
    if adapter and not folder.has_adapter:
        raise RunError(f"{folder.path}: this run has no adapter yet. Let it finish first: {folder.resume_command}")
    # What the run computed in is on record: this machine may prefer another precision.
    summary = folder.read_summary()
    said = (summary and summary.precision) or precision_of(config)
    if not isinstance(getattr(torch, said, None), torch.dtype):
        raise RunError(f"{folder.summary}: 'precision' should be that of the run, such as float32, and is '{said}'")
    trained = said if config.model.dtype == "auto" else config.model.dtype
    quantisation = config.quantisation if quantised else "none"
    model = load_fitting(base_of_run(folder, config), trained, config.model.attention, quantisation)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    if adapter:
        load_finite(model, folder.adapter)
    return model.eval()


def base_of_run(folder: RunFolder, config: RunConfig) -> Source:
    """Where the base of the run in ``folder`` comes from. Raises ModelError if it is not there any more."""
    try:
        return source_of(config, head_of(folder.read_summary()))
    except ModelError as error:
        raise ModelError(
            f"{folder.path}: the model that this run was trained on is not where it was: {error} If it was moved, say "
            f"where to (model.name in {folder.config})"
        ) from None


def head_of(summary: Summary | None) -> ModelHead:
    """What the model of a run with this summary was read for."""
    return summary.head.head if summary is not None and summary.head is not None else ModelHead()


def load_finite(model: Any, folder: Path, name: str = DEFAULT) -> None:
    """Load an adapter to answer with, under ``name``. Raises AdapterError as ``load_adapter`` does, and for values that
    are no numbers: all that the model computed would be none, and its answers empty."""
    load_adapter(model, folder, name)
    for place, module in entries(model, name).items():
        for key, tensor in module.adapter.stored_tensors().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise AdapterError(
                    f"{folder}: {place}.{key} holds NaN or infinity, so the model computes nothing else. Its training "
                    "diverged: lower the learning rate, or take an earlier checkpoint"
                )


def changed_base(folder: RunFolder, source: Source) -> str | None:
    """What the user should know of the run in ``folder`` where its model, at ``source``, is another than it was when
    the run began."""
    summary = folder.read_summary()
    then = summary.model_digest if summary is not None else None
    if then is None or model_digest(source) in (None, then):
        return None
    return (
        f"{source.name} holds another model than the one that {folder.path} was trained on: its weights or its "
        "tokenizer have changed, so what the run has learnt does not belong to it"
    )


def adapter_mark(folder: RunFolder) -> str | None:
    """By which the numbers of the run's adapter are known again, whatever its description says; None where there is
    none."""
    try:
        return mark(adapter_files(folder.adapter)[1])
    except (OSError, AdapterError):
        return None


def changed_adapter(folder: RunFolder) -> str | None:
    """What the user should know of the run in ``folder`` where its adapter is another than the one that it wrote."""
    summary = folder.read_summary()
    then = summary.adapter_mark if summary is not None else None
    if then is None or adapter_mark(folder) in (None, then):
        return None
    return (
        f"{folder.adapter} holds another adapter than the one that {folder.path} was trained to, so what the run says "
        "of itself, its settings and its results, are not of this one"
    )


def changes_in(folder: RunFolder, source: Source) -> list[str]:
    """What the user should know of the run in ``folder`` before its adapter is used, a sentence each."""
    return [told for told in (changed_base(folder, source), changed_adapter(folder)) if told is not None]


def doubt_of(adapter: Path | str, source: Source) -> str | None:
    """What the user should know of ``adapter`` where it says that it was made for another model than that of
    ``source``: the shapes may be the same, and the answers no good; or where it is another than that of the run whose
    folder is named. None where it says none, or this one."""
    if is_run(Path(adapter)) and (changed := changed_adapter(RunFolder(Path(adapter)))) is not None:
        return changed
    said = base_said_by(str(adapter))
    known = {Path(name).name.lower() for name in (source.name, source.location, hub_id(source)) if name}
    stem = Path(source.location).stem.lower()
    if said is None or said.lower() in known or (source.kind == "gguf" and said.lower().startswith(stem)):
        return None
    return f"the adapter says that it was made for {said}, and the model is {source.name}"


def with_tokens_of(adapter: Path | None, source: Source) -> Source:
    """``source`` with the tokens, the chat template and the languages of the tokenizer that was handed over with
    ``adapter``, if one was: it was trained on them. Raises AdapterError where one of its own tokens has another number
    there."""
    if adapter is None or not (adapter / "tokenizer.json").is_file():
        return source
    beside = load_tokenizer(Source(str(adapter), "folder", str(adapter.absolute())))
    own = load_tokenizer(source)
    known, template = own.get_vocab(), beside.chat_template
    added = sorted((token, word) for word, token in beside.get_added_vocab().items() if word not in known)
    taken = {token: word for word, token in known.items()}
    for word, token in beside.get_added_vocab().items():
        if (other := taken.get(token, word)) != word or known.get(word, token) != token:
            raise AdapterError(
                f"{adapter}: it was trained with the token {word!r} under the number {token}, which is {other!r} in "
                f"the tokenizer of {source.name}; so its embeddings would be those of other words"
            )
    changed = isinstance(template, str) and template != own.chat_template
    tokens = (*source.add_tokens, *(word for _, word in added))
    marks: list[Any] = [(getattr(one, "src_lang", None), getattr(one, "tgt_lang", None)) for one in (beside, own)]
    languages = marks[0] if None not in marks[0] and marks[0] != marks[1] else None
    return replace(source, add_tokens=tokens, chat_template=template if changed else "", languages=languages)
