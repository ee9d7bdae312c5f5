"""Errors of the disk, of memory, of open files and of encodings become sentences that say what helps."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trimtab.config.read import build_config
from trimtab.errors import AdapterError, ConfigError, MachineError, machine_errors, machine_refusal
from trimtab.files import write_json


@contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    """While open, this process may not use more of ``what``."""
    before = resource.getrlimit(what)
    told = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)
        signal.signal(signal.SIGXFSZ, told)


def raised(work: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:
        work()
    return caught.value


WRITERS: dict[str, Callable[[Path], object]] = {
    "a text": lambda folder: (folder / "text").write_text("x" * 9000),
    "torch.save": lambda folder: torch.save(torch.zeros(9000), folder / "tensor.pt"),
    "safetensors": lambda folder: save_file({"a": torch.zeros(9000)}, folder / "tensor.safetensors"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_be_written_to_its_end(writer: str, tmp_path: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, 5000):
        error = raised(lambda: WRITERS[writer](tmp_path))
    said = machine_refusal(error, tmp_path)
    assert said is not None
    assert said.startswith(f"{tmp_path}: a file ")
    assert said.endswith(("raise the limit (ulimit -f unlimited)", "free some of it"))


@pytest.mark.parametrize("writer", WRITERS)
def test_too_many_open_files(writer: str, tmp_path: Path) -> None:
    with limited(resource.RLIMIT_NOFILE, 0):
        error = raised(lambda: WRITERS[writer](tmp_path))
    assert "too many files are open; raise the limit (ulimit -n 4096)" in str(machine_refusal(error, tmp_path))


def test_too_little_memory() -> None:
    for error in (raised(lambda: torch.zeros(2**50)), MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        assert str(machine_refusal(error)).startswith("there is not enough memory; close other programs, or take small")


def test_how_much_room_there_is_and_how_much_is_needed(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "new" / "file"))
    said = str(machine_refusal(error, needed=40 * 2**20))
    assert said.startswith(f"{tmp_path / 'new' / 'file'}: the disk is full (")
    assert said.endswith(" MiB are free, about 40.0 MiB are needed); free some of it")


def test_a_character_that_an_encoding_does_not_have() -> None:
    for text, encoding, helps in (
        ("\u2717", "ascii", "set PYTHONUTF8=1"),
        ("\ud800", "utf-8", "mend the text that it is in"),
    ):
        assert machine_refusal(raised(lambda text=text, encoding=encoding: text.encode(encoding))) == (
            f"the character U+{ord(text):04X} cannot be written in the encoding {encoding}; {helps}"
        )


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    said = "the working directory is gone; change to one that is there"
    assert str(machine_refusal(raised(Path.cwd))).startswith(said)
    with pytest.raises(ConfigError, match=rf"run\.yaml: a path cannot be looked up \({said}"):
        build_config({"model": "a/b", "data": {"train": "rows.jsonl"}, "output": "out"}, tmp_path, "run.yaml")


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with limited(resource.RLIMIT_FSIZE, 5000):
        error = raised(lambda: write_json(file, "x" * 9000))
    assert str(machine_refusal(error)).startswith(f"{file}: a file grew larger than is allowed here")
    (tmp_path / "folder").write_text("")
    error = raised(lambda: write_json(tmp_path / "folder" / "results.json", 1))
    assert str(machine_refusal(error)).startswith(f"{tmp_path / 'folder'}: ")


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("b"), RuntimeError("shapes differ"), FileNotFoundError()])
def test_a_mistake_of_ours_is_not_the_machines(error: Exception, tmp_path: Path) -> None:
    error.__context__ = OSError(errno.ENOSPC, "was handled")
    assert machine_refusal(error) is None
    with pytest.raises(type(error)), machine_errors(tmp_path):
        raise error


def test_what_to_do_next_is_said_once(tmp_path: Path) -> None:
    def fail(cause: Any) -> None:
        with machine_errors(tmp_path, then=", twice"), machine_errors(tmp_path, then=", then rest"):
            raise AdapterError("the adapter cannot be saved") from cause

    with pytest.raises(MachineError, match=r"^the adapter cannot be saved, then rest$"):
        fail(OSError(errno.EROFS, "read-only"))
    with pytest.raises(AdapterError, match=r"^the adapter cannot be saved$"):
        fail(None)
