"""Locks: one process at a time, and none that outlives its process."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

from trimtab.errors import RunError
from trimtab.runs.lock import locked

HOLD = """
import sys
from pathlib import Path
from trimtab.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_until_its_process_ends(tmp_path: Path) -> None:
    file = tmp_path / "study" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=r"study: another process \(\d+, since .*\) is at work here"), locked(file):
            pass
        other.kill()
    with locked(file):
        pass


def test_a_lock_is_let_go_of_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with pytest.raises(KeyError), locked(file):
        raise KeyError
    with locked(file), pytest.raises(RunError), locked(file):
        pass


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks of its own, as some that are mounted over a network."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse_then_soft(refuse))


def refuse_then_soft(refuse: Callable[..., None]) -> Callable[..., object]:
    real = filelock.FileLock.acquire

    def acquire(lock: filelock.BaseFileLock, *arguments: object, **named: object) -> object:
        if not isinstance(lock, filelock.SoftFileLock):
            refuse()
        return real(lock, *arguments, **named)  # type: ignore[arg-type]

    return acquire


@pytest.mark.usefixtures("without_locks")
def test_a_file_stands_in_where_there_are_no_locks(tmp_path: Path) -> None:
    file = tmp_path / "run" / ".lock"
    with locked(file):
        assert str(os.getpid()) in file.read_text()
        with pytest.raises(RunError, match=rf"run: another process \({os.getpid()}\) is at work here"), locked(file):
            pass
    assert not file.parent.exists()


@pytest.mark.usefixtures("without_locks")
def test_the_file_of_a_dead_process_is_taken_over_and_that_of_another_machine_is_told(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    file.write_text(f"{2**22 + 1}\n{socket.gethostname()}\n")
    with locked(file):
        pass
    file.write_text("4242\nnode-7.example\n")
    told = r"a process on the machine node-7\.example \(4242; if it is no more, remove .*\.lock\) is at work here"
    with pytest.raises(RunError, match=told), locked(file):
        pass
