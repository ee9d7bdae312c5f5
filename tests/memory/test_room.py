"""The estimate of memory against what is really kept, and what the machine is found to have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.errors import ModelError
from trimtab.memory import room
from trimtab.memory.room import GIB, MemoryEstimate, available_memory, check_fits, stored_bytes


def test_what_does_not_fit_is_refused_with_numbers_and_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "0.25")
    estimate = MemoryEstimate(GIB, activations=GIB // 2, files=GIB, process=GIB, moment="training")
    assert estimate.total == 3.5 * GIB
    assert estimate.needed == 1.5 * GIB  # pages of files go back, and the process is there already
    with pytest.raises(ModelError) as caught:
        check_fits(estimate, "Training tiny", advice=["a=1: 0.20 GiB", "b=2: 0.10 GiB"])
    text = str(caught.value)
    assert text.startswith("Training tiny needs about 1.50 GiB (weights 1.00, activations 0.50), and 0.25 GiB of")
    assert "What would help: a=1: 0.20 GiB; b=2: 0.10 GiB." in text


@pytest.mark.parametrize(
    ("kind", "size"), [("none", 2.0), ("int8", 1 + 4 / 4096), ("nf4", 0.5 + 1 / 64 + 4 / 64 / 256)]
)
def test_stored_bytes_of_a_weight(kind: str, size: float) -> None:
    found = stored_bytes((4096, 4096), torch.bfloat16, kind)
    assert 0 <= found - size * 4096**2 <= 2048  # the tables of nf4


def test_what_fits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "1")
    check_fits(MemoryEstimate(weights=GIB), "Training tiny")
    with pytest.raises(ModelError):
        check_fits(MemoryEstimate(weights=GIB + 1), "Training tiny")


def test_the_machine_has_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_MEMORY_GIB", raising=False)
    assert 0 < available_memory() <= room.psutil.virtual_memory().total


@pytest.mark.parametrize("text", ["much", "inf"])
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", text)
    with pytest.raises(ModelError, match=f"TRIMTAB_MEMORY_GIB: expected a number of GiB, got '{text}'"):
        available_memory()


def _group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_control_groups_of_the_second_version(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    _group(mount / "a" / "b", {"memory.max": "max\n", "memory.current": "50\n", "memory.stat": ""})
    _group(
        mount / "a", {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": "anon 300\ninactive_file 100\n"}
    )
    (tmp_path / "self").write_text("0::/a/b\n")
    assert list(room._control_group_rooms(tmp_path / "self", mount)) == [700]  # cache can be given back


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    files = {
        "memory.limit_in_bytes": "1000\n",
        "memory.usage_in_bytes": "400\n",
        "memory.stat": "total_inactive_file 50\n",
    }
    _group(mount / "memory", files)  # inside a container, where the name is the host's
    (tmp_path / "self").write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n1:name=systemd:/\n0::/\n")
    assert list(room._control_group_rooms(tmp_path / "self", mount)) == [650]


def test_a_group_above_its_limit_has_no_room(tmp_path: Path) -> None:
    _group(tmp_path / "cgroup", {"memory.max": "100", "memory.current": "150", "memory.stat": ""})
    (tmp_path / "self").write_text("0::/\n")
    assert list(room._control_group_rooms(tmp_path / "self", tmp_path / "cgroup")) == [0]


def test_no_control_groups(tmp_path: Path) -> None:
    assert list(room._control_group_rooms(tmp_path / "none", tmp_path)) == []
