"""The folder of a Ray of our own: it goes at the end, and where the command was killed, at the next start."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil
import pytest

from trimtab.studies.ray_folder import ray_folder


def test_folders_of_processes_that_are_gone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("trimtab.studies.ray_folder._LONGEST", 1000)
    gone = next(number for number in range(2**22, 2, -1) if not psutil.pid_exists(number))
    with ray_folder() as first:
        mine = f"-{os.getpid()}-"
        assert mine in first.name
        left = first.rename(first.with_name(first.name.replace(mine, f"-{gone}-")))
        elsewhere = tmp_path / f"trimtab-ray-0000-{gone}-abcdefgh"  # of a machine that shares the place
        other = tmp_path / "trimtab-ray-kept"
        for folder in (elsewhere, other, left / "session"):
            folder.mkdir()
        with ray_folder() as second:
            assert not left.exists()
            assert all(folder.exists() for folder in (second, elsewhere, other))
        assert not second.exists()


def test_the_paths_of_sockets_stay_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/a/place/for/temporary/files/that/has/a/long/name")
    with ray_folder() as folder:
        session = folder / "session_2026-11-29_19-55-43_123456_1234567" / "sockets" / "plasma_store"
        assert len(str(session)) <= 107
