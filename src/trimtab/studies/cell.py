"""One cell of a study: one run in a process of its own, of which only the results stay on disk.

    result = run_cell(config)

A process of its own gives every cell its own peak of memory, gives that memory back, and confines a crash. The cell's
folder is ``config.output``:

    cell.json    what came out; written last and in one step, so that a cell is done or it is not
    run/         the run folder while it goes on; afterwards it is removed, or kept with its adapter

A cell is known by its ``identity``: the whole configuration but ``output``, each local data file by its content. What
is done is never run again, what was cut off goes on from its last checkpoint, and a folder that holds another
configuration's cell is refused: nothing is overwritten. A study that names its folders by `digest` never meets that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from trimtab.config.run import RunConfig
from trimtab.errors import RunError
from trimtab.files import read_json, read_jsonl, write_json
from trimtab.runs.events import Listener
from trimtab.runs.folder import RunFolder
from trimtab.runs.records import Summary
from trimtab.studies.process import run_apart


def run_cell(
    config: RunConfig,
    listener: Listener | None = None,
    *,
    keep: Literal["results", "adapters"] = "results",
    measure: Callable[[RunFolder], Any] | None = None,
) -> dict[str, Any]:
    """Do the run of ``config`` in a process of its own, unless it is done, and return what ``cell.json`` holds.

    That is the run's ``summary.json`` (``trainable_parameters``, ``training_seconds``, ``peak_memory_gib``, ``steps``,
    ...), and

    - ``tests``: test set -> its evaluation after training (``accuracy``, ``macro_f1``, ... or ``exact_match`` or
      ``perplexity``), with ``correct``, a ``1`` or a ``0`` for each row; of a run of no epochs, the model's as it is;
    - ``before``: the same of the untuned model, if the run evaluates it;
    - ``validation``: the lines of ``metrics.jsonl`` of that kind, in order;
    - ``kept``: the one of them whose adapter the run ended with; None without validation rows;
    - ``measured``: what ``measure`` gave, if it was asked for;
    - ``identity``.

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
    if (done := finished_cell(config)) is not None:
        return done
    folder = RunFolder(config.output / "run")
    if folder.status != "finished":
        run_apart(config.model_copy(update={"output": folder.path}), listener or Listener())
    found = {"identity": identity(config), **_results(folder, config)}
    if measure is not None:
        found["measured"] = measure(folder)
    write_json(config.output / "cell.json", found)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    if keep == "results":
        shutil.rmtree(folder.path)
    return found


def finished_cell(config: RunConfig) -> dict[str, Any] | None:
    """What the cell of ``config`` gave, if it is done. Raises RunError if its folder holds another one's results."""
    file = config.output / "cell.json"
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = read_json(file)
        same = found["identity"] == identity(config)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: a damaged file ({error}); remove it to run this cell again") from None
    if not same:
        raise RunError(f"{file}: the results of another configuration; choose another output, or remove the folder")
    return found


def identity(config: RunConfig) -> dict[str, Any]:
    """What decides a cell's results, ready for JSON: ``config`` without ``output``, local data by name and content.

    Raises RunError where a data file cannot be read.
    """
    said = config.model_dump(mode="json", exclude={"output"})

    def by_content(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: by_content(item) for key, item in value.items()}
        if isinstance(value, list):
            return [by_content(item) for item in value]
        path = Path(value) if isinstance(value, str) else None
        if path is None or not path.is_absolute():  # a fraction, none, or a hub id
            return value
        try:
            return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        except OSError as error:
            raise RunError(f"{path}: the rows cannot be read ({error.strerror})") from None

    for key in ("train", "validation", "test"):
        said["data"][key] = by_content(said["data"][key])
    return said


def digest(config: RunConfig) -> str:
    """Eight hexadecimal digits of `identity`, for a folder's name."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _results(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    stage = "after" if config.train.epochs else "before"
    rows = [line.plain() for line in folder.read_metrics() if line.kind == "validation"]
    summary = folder.read_summary() or Summary()
    kept = next((row for row in rows if row["step"] == summary.best_step), rows[-1] if rows else None)
    return {
        **summary.plain(),
        "tests": dict(_evaluations(folder, config, stage)),
        "before": dict(_evaluations(folder, config, "before")),
        "validation": rows,
        "kept": kept,
    }


def _evaluations(folder: RunFolder, config: RunConfig, stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in config.data.test:
        with contextlib.suppress(FileNotFoundError):  # the untuned model, where it was not asked for
            result = read_json(folder.evaluation(name, stage))
            predictions = folder.path / "predictions" / f"{name}.{stage}.jsonl"
            if predictions.is_file():
                result["correct"] = "".join("01"[row["correct"]] for row in read_jsonl(predictions))
            yield name, result
