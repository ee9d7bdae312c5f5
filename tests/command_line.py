"""The command line, run in the test's own process: what a test gives it and what it did."""

from __future__ import annotations

import io
import re
import signal
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
