"""What killed processes leave; who may read what was written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from trimtab.files import remove_leftovers, temporary_folder, write_atomically, write_folder, write_tensors, write_text

KILLED = """
import os, sys
from pathlib import Path
from trimtab.files import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    os._exit(1)
"""


def kill_in(folder: Path) -> Path:
    """A process that is killed while it has a temporary folder in ``folder``; gives what it left."""
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False).returncode == 1
    (left,) = folder.glob(".saving-*")
    return left


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    left = kill_in(tmp_path)
    mine = [tmp_path / ".saving-notes", tmp_path / ".saving-5bce98f7-thesis"]
    for file in mine:
        file.write_text("a user's own")
    with temporary_folder(tmp_path) as alive:
        write_text(tmp_path / "next.txt", "next")
        assert sorted(tmp_path.iterdir()) == sorted([*mine, alive, tmp_path / "next.txt"])
    assert not left.exists()


def test_leftovers_of_another_machine_stay_for_a_day(tmp_path: Path) -> None:
    left = kill_in(tmp_path)
    other = left.rename(tmp_path / f".saving-00000000-{left.name.split('-', 2)[2]}")
    remove_leftovers(tmp_path)
    assert other.exists()
    os.utime(other, (0, time.time() - 25 * 60 * 60))
    remove_leftovers(tmp_path)
    assert not other.exists()


def test_under_a_lock_all_leftovers_go_but_none_of_this_process(tmp_path: Path) -> None:
    inside = tmp_path / "run" / "adapter"
    left = kill_in(inside)
    other = left.rename(inside / f".saving-00000000-{left.name.split('-', 2)[2]}")
    (old := inside / ".saving-k3j_x81a").mkdir()  # as version 0.1 named them
    with temporary_folder(inside) as alive:
        remove_leftovers(tmp_path, alone=True)
        assert list(inside.iterdir()) == [alive]
    assert not other.exists()
    assert not old.exists()


def test_a_folder_that_was_moved_away_when_the_process_was_killed_comes_back(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")

    def fill(folder: Path) -> None:
        (folder / "weights").write_text("new")

    child = os.fork()
    if child == 0:
        with_death = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if self.name == "new":
                os._exit(1)
            return with_death(self, target)

        Path.rename = rename  # type: ignore[assignment,method-assign]
        write_folder(tmp_path / "model", fill, replace=True)
    os.waitpid(child, 0)
    assert not (tmp_path / "model").exists()
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_readable_as_the_umask_says(mask: int, mode: int, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.touch(0o600)  # as safetensors makes its files

    with umask(mask):
        write_atomically(tmp_path / "file", write)
        write_folder(tmp_path / "folder", lambda folder: write(folder / "file"), replace=False)
    for file in (tmp_path / "file", tmp_path / "folder" / "file"):
        assert file.stat().st_mode & 0o777 == mode


def test_the_same_tensors_are_the_same_file(tmp_path: Path) -> None:
    """safetensors puts metadata in another order in each process, and in one process each time."""
    tensors = {"one": torch.arange(4.0), "zwei": torch.ones(2, 3)}
    metadata = {"format": "pt", "modules": '{"ä": "\\u2028"}', "a\n": "\x7f"}
    files = [tmp_path / str(number) for number in range(8)]
    for file in files:
        write_tensors(file, tensors, metadata)
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], framework="pt") as stored:
        assert stored.metadata() == metadata
        assert all(torch.equal(stored.get_tensor(name), tensor) for name, tensor in tensors.items())
