"""The checkpoints of a run: one is there in whole, or it is not there.

checkpoints/.saving/          one that is being written
checkpoints/checkpoint-N/     complete.json in it has the size and the sum of each of its files
checkpoints/best-N/           the adapter of the best validation, which was at step N
checkpoints/damaged-...-N/    one that could not be gone on from; nothing removes it
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from trimtab.files import open_to_readers, read_json, write_json
from trimtab.reading import open_file, read_text

SAVING = ".saving"
COMPLETE = "complete.json"
STATE = "trainer_state.json"
UNLOGGED = "unlogged.json"
"""The losses since the last line of metrics: their sum, and of how many steps."""


def numbered(folder: Path, kind: str = "checkpoint") -> list[tuple[int, Path]]:
    """Step and folder of all that are there, the earliest first; whether each is whole says `damage`."""
    found = [(place.name.rpartition("-")[2], place) for place in folder.glob(f"{kind}-*") if place.is_dir()]
    return sorted((int(step), place) for step, place in found if step.isdecimal())


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def best_folder(folder: Path, step: int) -> Path:
    """Where the adapter of the best validation lies, which was at ``step``."""
    here = folder / f"best-{step}"
    before = folder / "best"  # of an earlier version, which kept one
    return here if here.is_dir() or not before.is_dir() else before


def generator_of(rank: int) -> str:
    """The file with the state of torch's generator in process ``rank`` of several (1 and up): what it drops out."""
    return f"rng_state_{rank}.pth"


def put(folder: Path, step: int, keep: int) -> None:
    """Make a checkpoint of what was written for it, in one step, and remove the oldest ones but ``keep``."""
    written, place = folder / SAVING / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    open_to_readers(written)
    files = {str(file.relative_to(written)): _sum(file) for file in sorted(written.rglob("*")) if file.is_file()}
    write_json(written / COMPLETE, files)
    remove(place)
    written.rename(place)
    prune(folder, keep)


def drop_half(folder: Path) -> None:
    """Remove a checkpoint that was not written to its end."""
    shutil.rmtree(folder / SAVING, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Remove the oldest checkpoints but ``keep``, what was left half written, and the best adapters that no checkpoint
    knows of."""
    drop_half(folder)
    there = numbered(folder)
    for _, place in there[:-keep]:
        remove(place)
    prune_best(folder)


def prune_best(folder: Path, *steps: int) -> None:
    """Remove the best adapters that no checkpoint knows of, but those of ``steps``."""
    known = {*steps, *(_best_step(place) for _, place in numbered(folder))}
    for step, place in numbered(folder, "best"):
        if step not in known:
            remove(place)


def set_aside(place: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither gone on from nor removed."""
    aside = place.with_name(f"damaged-{place.name}")
    if aside.exists():
        aside = aside.with_name(f"{aside.name}-{uuid4().hex[:6]}")
    return place.rename(aside)


def remove(place: Path) -> None:
    """Remove a folder of files. What makes it a whole one goes first."""
    (place / COMPLETE).unlink(missing_ok=True)
    (place / STATE).unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def damage(place: Path, needed: Iterable[str] = ()) -> str | None:
    """What is wrong with a checkpoint's files: one is missing, or not as it was written. None if nothing is.

    ``needed``: files that have to be there, even in one of an earlier version, which has no sums.
    """
    files: Any = {}
    try:
        if (place / COMPLETE).is_file():
            files = read_json(place / COMPLETE)
            if not isinstance(files, dict):
                return f"{COMPLETE} is damaged"
        for name in (*needed, *files):
            file = place / name
            if not file.is_file():
                return f"{name} is missing"
            if name in files and _sum(file) != files[name]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, RecursionError) as error:
        return f"it cannot be read ({error})"
    return None


def _sum(file: Path) -> dict[str, Any]:
    with open_file(file) as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _best_step(place: Path) -> Any:
    try:
        return json.loads(read_text(place / STATE))["best_global_step"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
