"""Output that meets a terminal of another encoding, or a reader that goes away."""

from __future__ import annotations

import errno
import io
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.table import Table

from tiny_runs import write_rows
from trimtab import TrimtabWarning
from trimtab.cli.displays.progress import ProgressLine
from trimtab.cli.exits import exit_code
from trimtab.cli.terminal import make_safe

TEXT = "ψ שלום 🚢 done ✗ 81.2 ± 1.3 é"


class Pipe(io.FileIO):
    """A file whose next writes fail as ``failing`` says."""

    failing = 0

    def write(self, data: Any) -> int:
        if self.failing:
            raise OSError(self.failing, os.strerror(self.failing))
        return super().write(data)


Streams = Callable[[str], Pipe]


@pytest.fixture
def stdout_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Streams]:
    """Gives stdout and stderr of the encoding that is named, made safe; what they write is in the file."""
    kept = []

    def make(encoding: str) -> Pipe:
        raw = Pipe(tmp_path / f"{encoding}.txt", "w")
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="strict")
            kept.append(stream)
            monkeypatch.setattr(sys, name, stream)
        make_safe()
        return raw

    yield make
    monkeypatch.undo()
    for stream in kept:
        with suppress(OSError, ValueError):  # a reader that went away, a file that both streams have
            stream.close()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-8", "gbk"])
def test_whatever_is_printed_can_be_written(stdout_in: Streams, encoding: str) -> None:
    raw = stdout_in(encoding)
    print(TEXT)
    typer.echo(TEXT)
    table = Table("answer", "…")
    table.add_row("✓ " + TEXT, "—")
    Console(force_terminal=True, width=60).print(table)
    print(TEXT, "\udc80 from a file's name", file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    said = Path(str(raw.name)).read_bytes().decode(encoding, errors="replace")
    assert said.count("done") == 4
    if encoding == "utf-8":
        assert said.count(TEXT) == 4
    if encoding in ("ascii", "latin-1", "cp1252"):
        assert "\\u05e9" in said
        assert "x 81.2" in said
    if encoding == "ascii":
        assert "+- 1.3 \\xe9" in said


@pytest.mark.parametrize("reason", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_nobody_reading_ends_nothing(stdout_in: Streams, reason: int) -> None:
    raw = stdout_in("utf-8")
    print("read", flush=True)
    raw.failing = reason
    console = Console(force_terminal=True)
    bar = ProgressLine(console)
    bar.start("training", 0, 10)
    bar.update("half", 5)
    bar.stop()
    print("not read", flush=True)
    print("not read", file=sys.stderr, flush=True)
    typer.echo("not read")
    assert Path(str(raw.name)).read_text() == "read\n"


@pytest.mark.parametrize(("reason", "code"), [(errno.EPIPE, 0), (errno.ENOSPC, 1), (errno.EIO, 1)])
def test_answers_that_a_full_disk_did_not_take_are_no_success(
    stdout_in: Streams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: int, code: int
) -> None:
    from trimtab.cli import main

    raw = stdout_in("utf-8")
    raw.failing = reason
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    monkeypatch.setattr("sys.argv", ["trimtab", "doctor"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    assert said.getvalue().startswith("trimtab: standard output: " if code else "")
    assert said.getvalue().endswith("; not all was printed\n" if code else "")


CLOSED = """
import os, sys
from trimtab.cli.terminal import make_safe
make_safe()
print("nobody reads this", flush=True)
file = os.open("file", os.O_CREAT | os.O_WRONLY)
os.write(2, f"{file} {sys.stdin.read()!r} {sys.stdin.isatty()}".encode())
"""


def test_a_stream_that_was_closed_leads_nowhere(tmp_path: Path) -> None:
    """As after `trimtab ... <&- >&-`: no file takes the place of stdin or stdout."""
    shell = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(CLOSED)} <&- >&-"
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "3 '' False")


def test_streams_of_a_test_or_a_notebook_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = io.StringIO()
    monkeypatch.setattr(sys, "stdout", ours)
    make_safe()
    assert sys.stdout is ours


def test_a_terminal_without_a_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    bar = ProgressLine(Console(file=out, force_terminal=True))
    bar.start("training", 0, 10)
    assert not bar.drawn
    assert not out.getvalue()


@pytest.mark.usefixtures("bare_runs")
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_run_whose_rows_the_terminal_cannot_show(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make_yaml: Callable[..., Path],
    tmp_path: Path,
    encoding: str,
) -> None:
    from trimtab.cli import main

    rows = [{"prompt": "السلام 🚀 berth?", "completion": f" ναι {number} 🌊"} for number in range(5)]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    yaml = make_yaml(data={"train": data, "test": {"same": data}}, train={"max_steps": 1})
    target = (tmp_path / "log.txt").open("w", encoding=encoding)
    monkeypatch.setattr(sys, "stdout", target)
    monkeypatch.setattr("sys.argv", ["trimtab", "finetune", str(yaml), "evaluation.max_new_tokens=2"])
    with pytest.raises(SystemExit) as end:
        main()
    target.close()
    said = (tmp_path / "log.txt").read_text(encoding=encoding)
    assert end.value.code == 0, capfd.readouterr().err
    assert "\\u0627" in said
    assert "try it: trimtab generate" in said


@pytest.mark.filterwarnings("always")
def test_what_we_warn_of_is_a_note_that_is_said_once_and_what_a_library_warns_of_stays_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def warning() -> None:
        for said in ("two layers stay as they are", "\x1b[2J is no setting", "two layers stay as they are"):
            warnings.warn(said, TrimtabWarning, stacklevel=1)
        warnings.warn("a library's own", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="a library's own") as others:
        assert exit_code(warning) == 0
    assert capsys.readouterr().err == "note: two layers stay as they are\nnote: \\x1b[2J is no setting\n"
    assert len(others) == 1
