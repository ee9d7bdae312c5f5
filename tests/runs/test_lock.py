"""Locks: one process at a time, and none that outlives its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
