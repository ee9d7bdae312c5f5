"""Does a piece of work in forks of this process: undisturbed, or killed at one of its changes and begun again.

What it leaves is compared file by file, bit for bit, with what the undisturbed one left. In the forks all clocks stand
still and memory is measured as nothing, so that no figure differs from one to the other, and a study's runs are made in
the fork itself and not in processes of their own.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from faults.dying import KILLED, Changes, announce_native_writes


@dataclass(frozen=True)
class Work:
    """Something that writes into ``folder`` and gives an exit code, as the command line does."""

    kind: str
    folder: Path
    begin: Callable[[], int]
    again: Callable[[], int]
    """What a user does after ``begin`` was killed."""
    prepare: Callable[[], object] = lambda: None
    """What is in the folder before."""
    passing: tuple[str, ...] = (".lock",)
    """The names of files that need not be alike."""


@dataclass(frozen=True)
class Place:
    """A change of a work where it can be killed: before it, or with the file that it opens ``opened`` and empty."""

    kind: str
    number: int
    opened: bool
    words: str

    def __str__(self) -> str:
        return f"{self.kind}, {'in' if self.opened else 'before'} change {self.number} ({self.words})"


class Trials:
    """The trials of one work. What is kept of them lies in ``beside``, by default beside the work's folder."""

    def __init__(self, work: Work, beside: Path | None = None) -> None:
        self._work = work
        beside = beside or work.folder.parent
        self._log = beside / f"{work.folder.name}.log"
        self._whole = beside / f"{work.folder.name}.whole"
        seen = self._log.with_suffix(".seen")

        def undisturbed() -> int:
            changes = Changes(work.folder)
            code = work.begin()
            seen.write_text("".join(f"{opening:d} {words}\n" for words, opening in changes.seen), encoding="utf-8")
            return code

        load_everything()
        self._fresh()
        if self._forked(undisturbed):
            raise RuntimeError(f"{work.kind} fails undisturbed:\n{self.said()}")
        shutil.rmtree(self._whole, ignore_errors=True)
        shutil.move(work.folder, self._whole)
        self.places: list[Place] = []
        """Where this work can be killed."""
        for number, line in enumerate(seen.read_text(encoding="utf-8").splitlines(), 1):
            opening, words = line.split(" ", 1)
            self.places += [Place(work.kind, number, opened, words) for opened in (False, True)[: 1 + int(opening)]]

    def kill(self, place: Place) -> str | None:
        """Kill the work there and begin again: what is different then, or None."""
        self._fresh()

        def killed() -> int:
            Changes(self._work.folder, place.number, opened=place.opened)
            return self._work.begin()

        if (code := self._forked(killed)) != KILLED:
            return f"{place}: was not reached (exit code {code})\n{self.said()}"
        return self.finish(str(place))

    def finish(self, where: str) -> str | None:
        """Begin again after what happened ``where``: what is different then, or None."""
        if self._forked(self._work.again):
            return f"{where}: cannot go on\n{self.said()}"
        differences = differing(self._whole, self._work.folder, self._work.passing)
        return f"{where}: {'; '.join(differences)}" if differences else None

    def begin(self, before: Callable[[], object]) -> int:
        """The exit code of the work, begun in a fork in which ``before`` was called."""
        self._fresh()

        def begun() -> int:
            before()
            return self._work.begin()

        return self._forked(begun)

    def begin_twice(self) -> tuple[list[int], str]:
        """The exit codes of two processes that do the work at once, and what they said."""
        self._fresh()
        logs = [self._log, self._log.with_suffix(".second")]
        children = [fork(self._work.begin, log) for log in logs]
        codes = [wait(child) for child in children]
        return codes, "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)

    def said(self) -> str:
        """The end of what the last fork printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def whole_bytes(self) -> int:
        """What the undisturbed folder takes."""
        return sum(file.stat().st_size for file in self._whole.rglob("*") if file.is_file() and not file.is_symlink())

    def _fresh(self) -> None:
        shutil.rmtree(self._work.folder, ignore_errors=True)
        self._work.prepare()

    def _forked(self, work: Callable[[], int]) -> int:
        return wait(fork(work, self._log))


def fork(work: Callable[[], int], log: Path) -> int:
    """Do ``work`` in a fork that prints to ``log`` and ends with its exit code; gives the fork's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123
        stand_still()
        announce_native_writes()
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a fork."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def load_everything() -> None:
    """Import what the works need: every fork begins with it."""
    import importlib

    for name in ("training.run", "cli", "cli.displays.run", "cli.displays.study", "reports.run.run_page", "drafting",
                 "reports.run.run_tables", "reports.study.study_page", "studies.compare", "studies.study_results",
                 "assessing", "evaluation.agreement", "runs.load", "surgery.merge", "export.merged"):  # fmt: skip
        importlib.import_module(f"trimtab.{name}")
    importlib.import_module("transformers.models.llama.modeling_llama")


def stand_still() -> None:
    """Stop the clocks that figures are taken from, let a study's runs be made in this process, and leave out the
    estimate of memory, which writes nothing."""
    import time

    from trimtab.studies import cell
    from trimtab.studies.process import run_here
    from trimtab.surgery.attach_report import AttachReport
    from trimtab.training import checks, metrics_log, run

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, 1, tzinfo=UTC)

    time.perf_counter = lambda: 0.0
    patched: Any = run
    patched.datetime, patched.peak_memory_gib = Then, lambda: 0.0
    patched = checks
    patched.check_run = lambda *_: AttachReport((), (), 0, 0)
    patched = metrics_log
    patched.memory_gib = lambda: 0.0
    patched.Lap.read = lambda lap: (0, 0.0)  # a resumed run has read other rows ahead
    patched = cell
    patched.run_apart = run_here


def differing(one: Path, other: Path, passing: tuple[str, ...]) -> list[str]:
    """In which files two folders differ."""
    files = [{path.relative_to(root): path for path in root.rglob("*")} for root in (one, other)]
    names = sorted(name for name in files[0].keys() | files[1].keys() if name.name not in passing)
    found = []
    for name in names:
        first, second = files[0].get(name), files[1].get(name)
        if first is None or second is None:
            found.append(f"{name} is {'missing' if second is None else 'left over'}")
        elif _content(first) != _content(second):
            found.append(f"{name} differs")
    return found


def _content(path: Path) -> tuple[int, object]:
    if path.is_symlink():
        return 0, path.readlink()
    return path.stat().st_mode, None if path.is_dir() else path.read_bytes()
