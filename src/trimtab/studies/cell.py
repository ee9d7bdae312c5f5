"""One cell of a study: one run in a process of its own, of which only the results stay on disk.

    result = run_cell(config)

A process of its own gives every cell its own peak of memory, gives that memory back, and confines a crash. The cell's
folder is ``config.output``:

    cell.json    what came out; written last and in one step, so that a cell is done or it is not
    run/         the run folder while it goes on; afterwards it is removed, or kept with its adapter

A cell is known by its ``identity``: the whole configuration but ``output``, each local data file by its content. What
is done is never run again, what was cut off goes on from its last checkpoint, and a folder that holds another
configuration's cell is refused: nothing is overwritten. A study that names its folders by `digest` never meets that.
Results of a model, or of a first adapter, whose files have changed since are refused, too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trimtab.config.run import RunConfig
from trimtab.data.rows import Source
from trimtab.data.sources import local_files, pictures_of
from trimtab.errors import AdapterError, DataError, ModelError, RunError
from trimtab.files import content_digest, read_json, remove_leftovers
from trimtab.models.known_again import model_digest
from trimtab.models.locate import locate
from trimtab.runs.events import Listener
from trimtab.runs.folder import RunFolder
from trimtab.runs.read import first_complaint, read_sets
from trimtab.runs.records import Summary
from trimtab.runs.results import Prediction, Result
from trimtab.runs.study_records import CellRecord
from trimtab.studies.process import run_apart


def run_cell(
    config: RunConfig,
    listener: Listener | None = None,
    *,
    keep: Literal["results", "adapters"] = "results",
    measure: Callable[[RunFolder], Any] | None = None,
) -> CellRecord:
    """Do the run of ``config`` in a process of its own, unless it is done, and return what ``cell.json`` holds.

    Args:
        config: any run; its ``output`` is the cell's folder.
        listener: is told what happens in the run as it happens. If it raises, the cell is stopped there; another call
            goes on from its last checkpoint.
        keep: ``adapters`` keeps the run folder without its checkpoints, ``results`` keeps ``cell.json`` alone.
        measure: is given the folder of the finished run while its checkpoints are still there; gives a value for JSON.

    Raises:
        RunError: the run failed (a cell that failed is tried again by the next call), or the folder holds something
            else.
        Interrupted: by the user; what was done is kept.
    """
    folder = RunFolder(config.output / "run")
    if (done := finished_cell(config)) is not None:
        _tidy(folder, keep)
        return done
    if folder.status != "finished":
        run_apart(config.model_copy(update={"output": folder.path}), listener or Listener())
    cell = _record(folder, config)
    if measure is not None:
        cell = cell.updated(measured=measure(folder))
    cell.write_to(config.output / "cell.json")
    _tidy(folder, keep)
    return cell


def _tidy(folder: RunFolder, keep: Literal["results", "adapters"]) -> None:
    """Remove what a cell that is done does not keep, or what is left of it where this was cut off.

    A run that was tidied already, and kept, has an adapter and no checkpoints: it stays.
    """
    remove_leftovers(folder.path.parent, alone=True)
    removed = folder.path.with_name(".removed")
    if folder.path.exists() and (folder.checkpoints.exists() or not folder.has_adapter):
        if keep == "results":
            shutil.rmtree(removed, ignore_errors=True)
            folder.path.rename(removed)
        else:
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
    if removed.exists():
        shutil.rmtree(removed)


def finished_cell(config: RunConfig) -> CellRecord | None:
    """What the cell of ``config`` gave, if it is done. Raises RunError if its folder holds another one's results."""
    file = config.output / "cell.json"
    if not file.is_file():
        return None
    mine = identity(config)
    try:
        cell = CellRecord.read(read_json(file))
        if cell.identity == mine:
            _require_whole(cell, config)
    except (ValueError, RecursionError) as error:
        reason = first_complaint(error) if isinstance(error, ValidationError) else error
        raise RunError(f"{file}: a damaged file ({reason}); remove it to run this cell again") from None
    if cell.identity != mine:
        raise RunError(f"{file}: the results of another configuration; choose another output, or remove the folder")
    if (changed := _model_changed_since(cell, config)) is not None:
        raise RunError(
            f"{file}: {changed} since these results were written, so they do not go with new ones; put it back, choose "
            "another output, or remove the folder to run this cell again"
        )
    return cell


def _require_whole(cell: CellRecord, config: RunConfig) -> None:
    """Raise ValueError unless ``cell`` has every test set, and says of each row whether it is right, where it says so
    of any."""
    if cell.tests.keys() != config.data.test.keys():
        names = " and ".join(config.data.test) or "none"
        raise ValueError(f"'tests': the test sets should be {names}")
    for name, result in cell.tests.items():
        right = result.correct
        if right is not None and (len(right) != result.rows or not set(right) <= {"0", "1"}):
            raise ValueError(f"'tests.{name}.correct': should be a 0 or a 1 for each of {result.rows} rows")


def changed_since(cell: CellRecord, config: RunConfig) -> str | None:
    """Which of the files that the run of ``cell`` read are others now, in words; None where none are, or where they
    are not there to look at."""
    then, now = cell.identity.get("data", {}), identity(config)["data"]
    if any(then.get(key) != now[key] for key in ("train", "validation")):
        return "the rows have changed"
    return _model_changed_since(cell, config)


def _model_changed_since(cell: CellRecord, config: RunConfig) -> str | None:
    """`changed_since` of what the run began from alone: the model and an adapter."""
    with suppress(ModelError):
        source = locate(config.model.name, revision=config.model.revision)
        if cell.model_digest is not None and model_digest(source) not in (None, cell.model_digest):
            return f"the model {config.model.name} has changed, its weights or its tokenizer,"
    if cell.began_from is not None and Path(name := config.adapter or "").is_absolute():
        from trimtab.adapters.placing import adapter_digest  # torch

        with suppress(AdapterError):
            if adapter_digest(name) != cell.began_from.sha256:
                return f"the adapter {name} that the run began from has changed"
    return None


def identity(config: RunConfig) -> dict[str, Any]:
    """What decides a cell's results, ready for JSON: ``config`` without ``output``, local data by name and content,
    that of the pictures which rows name with it.

    Raises RunError where a data file cannot be read.
    """
    said = config.model_dump(mode="json", exclude={"output"})
    data = config.data
    try:
        known = {path: _content(path) for source in data.sources if (path := Path(source.path)).is_absolute()}
        named: dict[Path, dict[str, None]] = {path: {} for path in known}
        for source in data.settled(data.sources):
            if (path := Path(source.path)) in known:
                named[path] |= dict.fromkeys(_pictures(source.model_dump_json(), known[path]))
    except OSError as error:
        raise RunError(f"{error.filename}: the rows cannot be read ({error.strerror})") from None

    def by_content(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: by_content(item) for key, item in value.items()}
        if isinstance(value, list):
            return [by_content(item) for item in value]
        path = Path(value) if isinstance(value, str) else None
        if path not in known:  # a fraction, none, or a hub id
            return value
        pictures = {"pictures": _together(map(Path, named[path]))} if named[path] else {}
        return {"file": path.name, "sha256": known[path], **pictures}

    for key in ("train", "validation", "test"):
        said["data"][key] = by_content(said["data"][key])
    return said


def _content(path: Path) -> str:
    """The SHA-256 of what a file of rows holds; of several files, which a pattern or a folder names, of their names and
    contents."""
    files = local_files(str(path), Path(path.anchor)) or [path]
    if len(files) == 1 and not files[0].is_dir():
        return content_digest(files[0])
    found = hashlib.sha256()
    for place in files:
        inside = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
        for file in inside:
            name = file.relative_to(place) if place.is_dir() else file.name
            found.update(f"{name}\0{content_digest(file)}\n".encode())
    return found.hexdigest()


@cache
def _pictures(source: str, content: str) -> tuple[str, ...]:
    """The pictures that the rows of ``source``, as JSON, name, where its files hold ``content``; none of a folder,
    whose content they are, and of rows that cannot be read, of which the run will tell."""
    said = Source.model_validate_json(source)
    root = Path(Path(said.path).anchor)
    with suppress(DataError):
        if not any(place.is_dir() for place in local_files(said.path, root)):
            return tuple(map(str, pictures_of(said, root=root)))
    return ()


def _together(files: Iterable[Path]) -> str:
    """The SHA-256 of what files hold, in their order; of one that is not there, nothing."""
    found = hashlib.sha256()
    for file in files:
        found.update((content_digest(file) if file.is_file() else "").encode() + b"\n")
    return found.hexdigest()


def digest(config: RunConfig) -> str:
    """Eight hexadecimal digits of `identity`, for a folder's name."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _record(folder: RunFolder, config: RunConfig) -> CellRecord:
    """What ``cell.json`` says of the finished run in ``folder``."""
    validation = [line for line in folder.read_metrics() if line.kind == "validation"]
    summary = folder.read_summary() or Summary()
    last = validation[-1] if validation else None
    kept = next((line for line in validation if line.step == summary.best_step), last)
    sets = {known.name: known for known in read_sets(folder.path)}
    named = [sets[name] for name in config.data.test if name in sets]
    before = {known.name: _scored(known.before, known.rows_before) for known in named if known.before}
    after = {known.name: _scored(known.after, known.rows_after) for known in named if known.after}
    return CellRecord(
        identity=identity(config),
        # Of an accelerator, where there is one: that is the memory which costs.
        **{
            **summary.plain(),
            "peak_memory_gib": summary.peak_device_memory_gib or summary.peak_memory_gib,
            "settings": {},  # they are in the identity
        },
        tests=after if config.train.epochs else before,
        before=before,
        validation=validation,
        kept=kept,
    )


def _scored(result: Result, predictions: Sequence[Prediction]) -> Result:
    """``result`` with which of its rows are right, where the predictions tell."""
    result = result.unnamed()
    right = [row.correct for row in predictions if row.correct is not None]
    return result.updated(correct="".join("01"[one] for one in right)) if right else result
