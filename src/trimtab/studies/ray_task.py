"""What Ray's workers do of a study: one run a task, in a process of its own there as here.

A task gets one text of JSON and, by path, the pieces of files that are carried; it gives one parcel of bytes (see
`trimtab.studies.carry`). How far it has come it writes on a `Board`, an actor that whoever sent it reads. So nothing of
ours is pickled but texts, numbers and bytes.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from trimtab.config.read import with_paths
from trimtab.config.run import RunConfig
from trimtab.errors import RunError, TrimtabError, machine_refusal
from trimtab.files import temporary_folder
from trimtab.runs.events import TOLD, Listener
from trimtab.studies import carry
from trimtab.studies.process import run_apart

VERSION = metadata.version("trimtab")

OFTEN = 0.5
"""Seconds between two words of how far a run has come."""


class Board:
    """Where runs write how far they have come, each word a line of JSON."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=20_000)

    def tell(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        """What was written since the last time."""
        taken = list(self._lines)
        self._lines.clear()
        return taken


class _Teller(Listener):
    """Writes what a run tells on the board; of steps and rows, no more than can be read."""

    def __init__(self, board: Any, number: int) -> None:
        self._board, self._number, self._last = board, number, 0.0

        def teller(method: str) -> Any:
            return lambda *arguments: self.tell(method, *arguments)

        for method in TOLD:
            setattr(self, method, teller(method))

    def tell(self, method: str, *arguments: Any) -> Any:
        now = time.monotonic()
        if method in ("step", "evaluating") and now - self._last < OFTEN:
            return None
        self._last = now
        return self._board.tell.remote(json.dumps([self._number, method, *arguments]))

    def is_over(self) -> None:
        """Wait until all that was told is on the board."""
        import ray

        with suppress(ray.exceptions.RayError):  # a lost board is no reason to lose the run
            ray.get(self.tell("training_ended"), timeout=5)


def do_run(order: str, pieces: dict[str, list[Any]], board: Any) -> bytes:
    """Do the run that ``order`` describes, and give its folder as a parcel; or one that says why it failed.

    Args:
        order: JSON, see `trimtab.studies.on_ray.Cluster`.
        pieces: path -> references to the pieces of a file, fetched where this machine has not the same file.
        board: the handle of a `Board`.
    """
    import ray

    said, machine = json.loads(order), socket.gethostname()
    try:
        if said["version"] != VERSION:
            raise RunError(
                f"the machine {machine} has trimtab {VERSION}, and the study is run by {said['version']}; install "
                "the same version on all"
            )
        teller = _Teller(board, said["number"])
        teller.tell("began", machine)
        with temporary_folder(Path(said["scratch"]) if said["scratch"] else _scratch()) as folder:
            root = Path(os.path.realpath(folder))

            def fetch(path: str) -> Iterable[bytes]:
                return (ray.get(piece) for piece in pieces.get(path, ()))

            files = [carry.Carried(**file) for file in said["files"]]
            carry.lay_out(root, files, fetch, links=said["links"])
            config = RunConfig.model_validate(said["config"])
            if (means := carry.model_words(config)) != said["model"]:
                raise RunError(
                    f"model.name: {config.model.name} is {means} on the machine {machine}, and {said['model']} where "
                    "the study is; install the same wheel on all, or name the model's folder"
                )
            run = carry.below(root, config.output / "run")
            moved = with_paths(config, lambda path: str(carry.below(root, path)))
            os.environ["OMP_NUM_THREADS"] = str(said["processors"])
            try:
                run_apart(moved.model_copy(update={"output": run}), teller)
            except TrimtabError as error:
                raise RunError(str(error).replace(str(root), "")) from None
            teller.is_over()
            return carry.packed(run, root, adapter=said["keep"] == "adapters")
    except Exception as error:
        told = str(error) if isinstance(error, TrimtabError) else machine_refusal(error)
        return carry.with_header({"failed": told or f"on the machine {machine}: {type(error).__name__}: {error}"})


def _scratch() -> Path:
    """The folder for what is made on the way: this user's alone, so that what a killed worker left is found again."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"trimtab-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (hasattr(os, "getuid") and folder.stat().st_uid != user):
        raise RunError(f"{folder}: belongs to somebody else; remove it, or set TMPDIR to a folder of your own")
    return folder


_TYPES = {"began": (str,), **TOLD}


def word(line: Any) -> tuple[int, str, list[Any]] | None:
    """Which errand a line of a `Board` is about, the method of its listener, and the arguments; None for anything
    else."""
    with suppress(ValueError, TypeError):
        number, method, *arguments = json.loads(line)
        if type(number) is int and tuple(map(type, arguments)) == _TYPES.get(method):
            return number, method, arguments
    return None
