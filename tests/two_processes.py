"""Two processes on this machine, spawned once and given one piece of work after the other, and what each of them says.

What they start from is in the environment, as torchrun puts it there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.multiprocessing

from tiny_runs import Kept

Work = Callable[[int], Any]
"""Given the number of the process; gives what its test looks at, as plain values."""


def both(works: Mapping[str, Work], root: Path, seconds: float = 240.0) -> dict[str, list[Any]]:
    """What each of two processes gives for each of ``works``, which are functions of modules that can be imported (or
    ``partial`` ones). An error is given as its type, its words and its code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = torch.multiprocessing.start_processes(
        _process, (str(root), port, dict(works)), nprocs=2, join=False, start_method="spawn"
    )
    until = time.monotonic() + seconds
    try:
        while not started.join(1.0):
            assert time.monotonic() < until, "the two processes have not come to their end"
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
    said = [json.loads((root / f"said-{rank}.json").read_text("utf-8")) for rank in range(2)]
    return {name: [one[name] for one in said] for name in works}


def _process(rank: int, root: str, port: int, works: Mapping[str, Work]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TRIMTAB_CACHE": f"{root}/cache"}
    torch.set_num_threads(1)
    said = {}
    for name, work in works.items():
        try:
            said[name] = work(rank)
        except BaseException as error:
            said[name] = {"error": type(error).__name__, "said": str(error), "code": getattr(error, "code", None)}
    (Path(root) / f"said-{rank}.json").write_text(json.dumps(said), "utf-8")


def train(
    rank: int, *, yaml: str, resume: bool = False, told_to_end: int | None = None, fails: int | None = None
) -> Any:
    """Train the run of ``yaml``; gives what the user is told.

    Args:
        told_to_end: the step after which the second process gets a SIGTERM.
        fails: the process that finds no memory for the model.
    """
    from trimtab.config.read import load_config
    from trimtab.errors import ModelError
    from trimtab.training import run, work

    run_bare(run)
    listener = Kept()
    before = work.load_model, work.Listener
    if rank == 1 and told_to_end is not None:
        work.Listener = _told_to_end_at(told_to_end)  # type: ignore[misc]
    if rank == fails:

        def refuse(*_: Any) -> Any:
            raise ModelError("no room for the model")

        work.load_model = refuse
    try:
        run.finetune(load_config(Path(yaml)), resume=resume, listener=listener)
    finally:
        work.load_model, work.Listener = before  # type: ignore[misc]
    return [*listener.notes, *listener.remarks]


def _told_to_end_at(at: int) -> Any:
    class Told(Kept):
        def step(self, step: int, steps: int) -> None:
            if step == at:
                signal.raise_signal(signal.SIGTERM)

    return Told


def run_bare(run: Any) -> None:
    """Leave out the estimate of memory and the page, which are not what is tested."""
    from trimtab.reports.run import run_page
    from trimtab.surgery.attach_report import AttachReport

    run.check_run = lambda *_: AttachReport((), (), 0, 0)
    run_page.write_run_page = lambda folder, summary=None: (folder / "report.html").write_text("")
