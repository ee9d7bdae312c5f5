"""The adapters that can be asked for: those in memory, and those that wait in their folders."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.adapters.formats import file_names
from trimtab.adapters.placing import local_folder
from trimtab.errors import AdapterError, did_you_mean
from trimtab.evaluation.generation import end_tokens
from trimtab.models.chat_template import spelled_end
from trimtab.models.locate import Source
from trimtab.models.model_files import load_tokenizer
from trimtab.runs.folder import RunFolder
from trimtab.runs.load import is_run, load_finite, with_tokens_of
from trimtab.serving.requests import Limits, Model, Request, UnknownModel
from trimtab.surgery.names import delete_adapter, entries


@dataclass(frozen=True)
class Reads:
    """What prompts for a model are made with, and what ends its answers.

    Attributes:
        tokenizer: with the chat template that the adapter was trained with.
        speller: a copy of it that the engine's thread writes with; a tokenizer is not made for several threads.
        form: the form of the run's rows; None where it is not known.
        ends: tokens that end an answer.
        spelled: the text that ends one in a chat, where the template ends turns with no token; empty for none.
    """

    tokenizer: Any
    speller: Any
    form: str | None
    ends: tuple[int, ...]
    spelled: str

    @classmethod
    def of(cls, model: Any, tokenizer: Any, form: str | None) -> Reads:
        ends = tuple(end_tokens(model, tokenizer))
        return cls(tokenizer, copy.deepcopy(tokenizer), form, ends, spelled_end(tokenizer))

    def stops(self, request: Request) -> tuple[str, ...]:
        """The texts that end an answer to ``request``."""
        chat = bool(self.spelled) and not request.same_text and not request.ignore_end
        return (*request.stop, self.spelled) if chat else request.stop


_Files = tuple[tuple[Path, int, int, int], ...]
"""Which files an adapter was read from: where each is, links followed, its inode, bytes, and time of writing."""


@dataclass
class _Known:
    folder: Path
    reads: Reads
    held_as: str  # the name that it has on the model; one that was dropped may still be in use under its own
    files: _Files
    since: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)
    nbytes: int = 0
    loaded: bool = False


class Shelf:
    """The adapters of one model by name. What loads or removes is called by the engine's own thread, outside of
    ``per_row``.

    Args:
        model: which carries those that are loaded.
        source: where the model came from.
        base: what the bare model reads with.
        limits: how many adapters, and how many bytes of them, may be in memory.
    """

    def __init__(self, model: Any, source: Source, base: Reads, limits: Limits) -> None:
        self._model, self._source, self._base, self._limits = model, source, base, limits
        self._known: dict[str, _Known] = {}
        self._left: dict[str, _Known] = {}  # dropped while rows went through them, by their names on the model
        self._count = 0
        self.loads = self.evictions = 0

    def models(self) -> list[Model]:
        return [
            Model(name, adapter=True, folder=str(one.folder), since=one.since, loaded=one.loaded, nbytes=one.nbytes)
            for name, one in list(self._known.items())
        ]

    def reads(self, name: str) -> Reads:
        """Raises UnknownModel."""
        return self._find(name).reads

    def held_as(self, name: str) -> str:
        """The name that the adapter ``name`` has on the model. Raises UnknownModel."""
        return self._find(name).held_as

    def add(self, name: str, folder: Path, in_use: Collection[str]) -> Model:
        """Take in the adapter of a folder, or of a run's, and load it once, so that it is known to fit.

        Raises AdapterError and the like, after which all is as it was, if it cannot be read or does not fit.
        """
        if not name or name in self._known:
            raise AdapterError(f"{name or 'an empty name'}: there is a model of this name already; give another")
        place, form = _adapter_in(folder)
        self._count += 1
        known = _Known(folder, self._reads_of(place, form), f"{name} #{self._count}", _files_of(place))
        self._load(known, place, in_use)
        self._known[name] = known
        return next(one for one in self.models() if one.name == name)

    def drop(self, name: str) -> None:
        """Forget an adapter. It leaves memory with the next `sweep` that finds it unused. Raises UnknownModel."""
        known = self._find(name)
        self._left[known.held_as] = known
        del self._known[name]

    def sweep(self, in_use: Collection[str]) -> None:
        """Take out of memory what was dropped and is no longer in use."""
        for held_as in [held_as for held_as in self._left if held_as not in in_use]:
            self._unload(self._left.pop(held_as))

    def unswept(self, in_use: Collection[str]) -> bool:
        """Whether `sweep` has something to do."""
        return any(held_as not in in_use for held_as in self._left)

    def is_loaded(self, held_as: str) -> bool:
        return self._by_held(held_as).loaded

    def has_room(self, held_as: str, in_use: Collection[str]) -> bool:
        """Whether the adapter is in memory, or could be, since others can leave."""
        known, limits = self._by_held(held_as), self._limits
        kept = [one for one in self._loaded() if one.held_as in in_use]
        many = limits.adapters is not None and len(kept) >= limits.adapters
        large = limits.adapter_bytes is not None
        large = large and sum(one.nbytes for one in kept) + known.nbytes > (limits.adapter_bytes or 0)
        return known.loaded or not (many or large)

    def load(self, held_as: str, in_use: Collection[str]) -> None:
        """Have the adapter in memory, and note that it is used now. Raises as `add`, and AdapterError where the files
        are no longer those that were added: nobody has looked at where they lie now, or whether they fit."""
        known = self._by_held(held_as)
        if not known.loaded:
            place, _ = _adapter_in(known.folder)
            if _files_of(place) != known.files:
                raise AdapterError(
                    f"{known.folder}: its files are not those that were added (others were written there, or some are "
                    "gone); drop this adapter and add it again"
                )
            self._load(known, place, in_use)
        known.used = time.monotonic()

    @property
    def nbytes(self) -> int:
        """Of all adapters in memory."""
        return sum(one.nbytes for one in self._loaded())

    @property
    def loaded(self) -> int:
        return len(self._loaded())

    def _find(self, name: str) -> _Known:
        if name not in self._known:
            known = list(self._known)
            raise UnknownModel(f"there is no model {name!r}.{did_you_mean(name, known)}")
        return self._known[name]

    def _by_held(self, held_as: str) -> _Known:
        return next(one for one in (*self._known.values(), *self._left.values()) if one.held_as == held_as)

    def _loaded(self) -> list[_Known]:
        return [one for one in (*list(self._known.values()), *list(self._left.values())) if one.loaded]

    def _load(self, known: _Known, place: Path, in_use: Collection[str]) -> None:
        limits = self._limits
        if limits.adapters is not None:
            self._make_room(in_use, limits.adapters - 1, None)
        try:
            load_finite(self._model, place, known.held_as)
        except BaseException:
            if entries(self._model, known.held_as):
                delete_adapter(self._model, known.held_as)
            raise
        parts = [module.adapter for module in entries(self._model, known.held_as).values()]
        known.nbytes = sum({id(one): one.nbytes for part in parts for one in part.parameters()}.values())
        known.loaded, known.used = True, time.monotonic()
        self.loads += 1
        if limits.adapter_bytes is not None:
            if known.nbytes > limits.adapter_bytes:
                self._unload(known)
                raise AdapterError(
                    f"{known.folder}: the adapter takes {known.nbytes:,} bytes, and {limits.adapter_bytes:,} are "
                    "allowed for all together; allow more"
                )
            self._make_room({*in_use, known.held_as}, None, limits.adapter_bytes)

    def _make_room(self, in_use: Collection[str], most: int | None, nbytes: int | None) -> None:
        """Let the least recently used adapters leave memory until there are no more than that."""
        idle = sorted((one for one in self._loaded() if one.held_as not in in_use), key=lambda one: one.used)
        for one in idle:
            if not ((most is not None and self.loaded > most) or (nbytes is not None and self.nbytes > nbytes)):
                break
            self._unload(one)
            self.evictions += 1

    def _unload(self, known: _Known) -> None:
        if known.loaded:
            delete_adapter(self._model, known.held_as)
        known.loaded = False

    def _reads_of(self, place: Path, form: str | None) -> Reads:
        """What prompts for the adapter in ``place`` are made with. Raises AdapterError where it was trained with more
        tokens than the model has."""
        source = with_tokens_of(place, self._source)
        if new := source.add_tokens[len(self._source.add_tokens) :]:
            raise AdapterError(
                f"{place}: it was trained with tokens that the served model lacks, such as {new[0]!r}. Serve the run "
                "that it came from, or merge it into a model of its own (trimtab merge)"
            )
        if source.chat_template == self._source.chat_template:
            return replace(self._base, form=form)
        return Reads.of(self._model, load_tokenizer(source), form)


def _files_of(place: Path) -> _Files:
    there = [place / name for name in file_names() if (place / name).is_file()]
    found = [(file.resolve(), file.stat()) for file in there]
    return tuple((path, one.st_ino, one.st_size, one.st_mtime_ns) for path, one in found)


def _adapter_in(folder: Path) -> tuple[Path, str | None]:
    """The folder of the adapter itself, and the form of the rows that it was trained on. Raises AdapterError."""
    if is_run(folder):
        run = RunFolder(folder)
        if not run.has_adapter:
            raise AdapterError(f"{folder}: this run has no adapter yet. Let it finish first: {run.resume_command}")
        summary = run.read_summary()
        return run.adapter, summary.form if summary is not None else None
    return local_folder(folder), None
