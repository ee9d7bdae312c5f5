"""What the machine is found to have, and what does not fit into it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import machine
from trimtab.errors import ModelError
from trimtab.machine import GIB, available_memory, check_fits, keep_few_products

WIDTHS = """
import ctypes, gc, psutil, sys, torch
from trimtab.machine import keep_few_products
if sys.argv[1] == "few":
    keep_few_products()
def held():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss
weight = torch.randn(256, 256).bfloat16().requires_grad_()
before = held()
for width in range(100, 400):
    (torch.randn(width, 256).bfloat16().requires_grad_() @ weight).sum().backward()
print((held() - before) >> 20)
"""


def test_what_does_not_fit_is_refused_with_numbers_and_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "0.25")
    advice = ["a=1: 0.20 GiB", "b=2: 0.10 GiB"]
    with pytest.raises(ModelError) as caught:
        check_fits("Training tiny", GIB * 3 // 2, parts="weights 1.00, activations 0.50", advice=lambda free: advice)
    text = str(caught.value)
    assert text.startswith("Training tiny needs about 1.50 GiB (weights 1.00, activations 0.50), and 0.25 GiB of")
    assert "What would help: a=1: 0.20 GiB; b=2: 0.10 GiB." in text


def test_what_fits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "1")
    check_fits("Training tiny", GIB)
    with pytest.raises(
        ModelError, match=r"Training tiny needs about 1\.00 GiB, and 1\.00 GiB of memory are free\. \(TRIM"
    ):
        check_fits("Training tiny", GIB + 1)


def test_nothing_of_torch_or_unix_is_needed_to_ask_for_memory() -> None:
    code = (
        "import sys, psutil; sys.modules['resource'] = None\n"
        "from trimtab import machine\n"
        "assert 0 < machine.memory_gib() <= machine.peak_memory_gib() and machine.available_memory() > 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_machine_has_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_MEMORY_GIB", raising=False)
    assert 0 < available_memory() <= machine.psutil.virtual_memory().total


@pytest.mark.parametrize("text", ["much", "inf"])
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", text)
    with pytest.raises(ModelError, match=f"TRIMTAB_MEMORY_GIB: expected a number of GiB, got '{text}'"):
        available_memory()


def test_the_user_decides_how_many_products_are_kept() -> None:
    environment = {"LRU_CACHE_CAPACITY": "7"}
    keep_few_products(environment)
    assert environment == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="gives freed memory back by malloc_trim, to see what is kept")
def test_memory_does_not_grow_with_the_number_of_widths() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    grown = {}
    for kept in ("few", "many"):
        command = [sys.executable, "-c", WIDTHS, kept]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        grown[kept] = int(done.stdout)
    if grown["many"] < 100:
        pytest.skip("this processor keeps little for a product in bfloat16")
    # Measured: 43 and 499 MiB for 900 products.
    assert grown["few"] < grown["many"] / 3


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
    assert list(machine._control_group_rooms(tmp_path / "self", mount)) == [700]  # cache can be given back


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    files = {
        "memory.limit_in_bytes": "1000\n",
        "memory.usage_in_bytes": "400\n",
        "memory.stat": "total_inactive_file 50\n",
    }
    _group(mount / "memory", files)  # inside a container, where the name is the host's
    (tmp_path / "self").write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n1:name=systemd:/\n0::/\n")
    assert list(machine._control_group_rooms(tmp_path / "self", mount)) == [650]


def test_a_group_above_its_limit_has_no_room(tmp_path: Path) -> None:
    _group(tmp_path / "cgroup", {"memory.max": "100", "memory.current": "150", "memory.stat": ""})
    (tmp_path / "self").write_text("0::/\n")
    assert list(machine._control_group_rooms(tmp_path / "self", tmp_path / "cgroup")) == [0]


def test_no_control_groups(tmp_path: Path) -> None:
    assert list(machine._control_group_rooms(tmp_path / "none", tmp_path)) == []
