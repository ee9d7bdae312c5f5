"""A disk that is full at any moment: exit code 1 and one sentence that says so. Once there is room, the same command
ends as if nothing had happened."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import sampling
from faults.trials import Trials
from faults.works import Scene

SIZES = 20
"""Sizes of the disk that are tried with ``--all``, in equal steps up to what the work leaves."""
FULL = ("the disk is full", "could not be written to its end, as on a full disk")


class Disk:
    """A small file system in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._most = "64m"

    def limit(self, room: int) -> None:
        """Leave ``room`` bytes beside what is there."""
        used = sum(file.stat().st_blocks * 512 for file in self.path.rglob("*") if not file.is_symlink())
        self._mount("remount", f"{(used + room) // 1024}k")

    def unlimit(self) -> None:
        self._mount("remount", self._most)

    def __enter__(self) -> Disk:
        self.path.mkdir()
        self._mount("", self._most)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def _mount(self, option: str, size: str) -> None:
        options = ",".join(filter(None, [option, f"size={size}"]))
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(self.path)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        with Disk(tmp_path / "disk") as small:
            yield small
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")


@pytest.mark.parametrize(
    "kind",
    [
        "run",
        pytest.param("study", marks=pytest.mark.full),
        pytest.param("merge over another", marks=pytest.mark.full),
        "save over another",
    ],
)
@pytest.mark.timeout(7200)
def test_a_full_disk_is_told_and_nothing_is_lost(kind: str, disk: Disk, tmp_path: Path, scene: Scene) -> None:
    trials = Trials(scene.work(kind, within=disk.path), beside=tmp_path)
    failures = []
    steps = range(1, SIZES + 1) if sampling.everything else (12,)
    for step in steps:
        room = trials.whole_bytes() * step // SIZES
        code = trials.begin(lambda room=room: disk.limit(room))  # type: ignore[misc]
        said = trials.said()
        disk.unlimit()
        where = f"{kind}, with room for {room} bytes"
        if code == 1 and any(words in said for words in FULL) and "Traceback" not in said:
            if (different := trials.finish(where)) is not None:
                failures.append(different)
        elif code != 0:  # what is removed meanwhile may have made room
            failures.append(f"{where}: exit code {code}\n{said}")
    assert not failures, "\n".join(failures)
