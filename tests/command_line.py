"""The command line, run in the test's own process: what a test gives it and what it did."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trimtab.signals import forget


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    def matches(self, pattern: str) -> bool:
        """Whether ``pattern`` is found in what stderr says, line breaks counted as any character."""
        return re.search(pattern, self.err, re.DOTALL) is not None


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Run ``trimtab WORDS...`` in this process, in the test's own folder; ``stdin`` is what it may read."""
    from trimtab.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*words: str, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.argv", ["trimtab", *map(str, words)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """A process that a script starts in the background has SIGINT ignored; here it interrupts, as at a terminal. For
    each test of a module that imports it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    forget()


def forked(*words: object, out: Path, err: Path) -> int:
    """Begin ``trimtab WORDS...`` in a fork of this process, which has loaded what it needs; gives the fork's number."""
    from trimtab.cli import main

    child = os.fork()
    if child:
        return child
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["trimtab", *map(str, words)]
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
