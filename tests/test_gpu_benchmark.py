"""``benchmarks/gpu.py``: every part of it on a processor with tiny shapes, what it says without a GPU, and that a part
that hangs or dies costs no more than itself."""

from __future__ import annotations

import json
import runpy
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield runpy.run_path(str(BENCHMARKS / "gpu.py"))
    for name in [name for name in sys.modules if name.startswith("gpu_") or name in ("common", "step", "quantised")]:
        del sys.modules[name]


def tiny(gpu: dict[str, Any], file: Path, *arguments: str) -> dict[str, Any]:
    gpu["main"](["--device", "cpu", "--tiny", "--json", str(file), *arguments])
    return json.loads(file.read_text("utf-8"))


def test_the_checks_hold_on_a_processor(gpu: dict[str, Any], tmp_path: Path) -> None:
    found = tiny(gpu, tmp_path / "gpu.json", "--part", "checks")["rows"]
    assert len(found) > 40
    assert {row["name"]: row["failed"] for row in found if row["failed"]} == {}
    assert all(0 <= row["worst"] <= 1 for row in found)
    names = " ".join(row["name"] for row in found)
    for part in (
        "dora on nf4",
        "mora on convolution",
        "serial on block",
        "per_row: a model",
        "bfloat16: per_row",
        "dora with dropout",
        "bfloat16: mora on int8",
    ):
        assert part in names


def test_a_check_that_fails_is_told_and_counted(
    gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.ops.kernels import plain

    forward = plain.forward

    def wrong(product: torch.Tensor, **parts: Any) -> torch.Tensor:
        return forward(product, **parts) * 1.1

    monkeypatch.setattr(plain, "forward", wrong)
    found = tiny(gpu, tmp_path / "gpu.json", "--part", "checks")
    assert any("output is off by" in text for row in found["rows"] for text in row["failed"])
    assert found["bars"][0]["found"] > 0


@pytest.mark.full
def test_steps_of_every_arm(gpu: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_record
    import gpu_steps

    found = tiny(gpu, tmp_path / "gpu.json", "--part", "steps")
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 3
    for name, row in rows.items():
        # On a processor PEFT moves an int8 weight about in each forward pass, which loses its scales.
        failed = {"peft dora"} if row["kind"] == "int8" else set()
        assert set(row["errors"]) <= failed, name
        dense = set() if row["kind"] == "bf16" else {"dense dora"}
        assert set(row["ratio"]) >= {*gpu_steps.ARMS} - dense - failed
        assert all(value > 0 for value in row["ms"].values())
        assert row["launches"]["dora"] > row["launches"]["frozen"]
        assert row["peak_mib"]["dora"] >= row["peak_mib"]["frozen"]
    missing = {bar["what"] for bar in found["bars"] if bar["found"] is None}
    assert missing <= {"checks that fail", "int8: DoRA / PEFT's DoRA"}
    gpu_record.print_tables(gpu_record.Record(tmp_path / "gpu.json"))
    printed = capsys.readouterr().out
    assert "DoRA / PEFT's DoRA" in printed
    assert "not measured" in printed


def test_without_time_the_rest_is_left_out_in_words(gpu: dict[str, Any], tmp_path: Path) -> None:
    for part in ("checks", "steps"):
        found = tiny(gpu, tmp_path / f"{part}.json", "--part", part, "--until", str(time.time() - 1))
        assert [row for row in found["rows"] if row["part"] == "steps"] == []
        assert any("ran out of time" in text for text in found["notes"])


@pytest.mark.full
def test_a_short_run_by_the_command_line(gpu: dict[str, Any], tmp_path: Path) -> None:
    rows = tiny(gpu, tmp_path / "gpu.json", "--part", "run")["rows"]
    assert len(rows) == 2
    for row in rows:
        assert "error" not in row, row["error"]
        assert row["status"] == "finished"
        assert row["steps"] == 2
        assert row["machine"]
    assert rows[1]["precision"] == "float16"
    assert any("batches without padding" in note for note in rows[1]["notes"])


def test_a_part_that_dies_or_hangs_costs_no_more_than_itself(
    gpu: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_record

    file, called = tmp_path / "gpu.json", []

    def process(arguments: list[str], seconds: float) -> int | None:
        called.append((arguments[1], "--plain" in arguments))
        record = gpu_record.Record(file)
        if arguments[1] == "steps" and len(called) == 2:
            record.add("steps", name="first", shape="8b", kind="bf16", tokens=4096, error="it ended the process")
            return -11
        if arguments[1] == "run":
            return None
        if arguments[1] == "checks":
            record.add("checks", name="dora on linear", cases=1, worst=0.5, failed=[])
        return 0

    monkeypatch.setitem(gpu["main"].__globals__, "_process", process)
    gpu["main"](["--device", "cpu", "--json", str(file), "--budget", "60"])
    assert called == [("checks", False), ("steps", False), ("steps", True), ("run", False)]
    found = json.loads(file.read_text("utf-8"))
    assert any("code -11" in text for text in found["notes"])
    assert any("time was used up" in text for text in found["notes"])
    assert len(found["rows"]) == 2
    assert "it ended the process" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"there is no GPU here .* nothing is measured"):
        gpu["main"]([])


def test_of_bitsandbytes_one_library_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    wheels = runpy.run_path(str(BENCHMARKS / "gpu_wheels.py"))
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    names = ["b/__init__.py", "b/lib_cpu.so", "b/lib_cuda130.so", "b/lib_cuda128.so", "b-1.dist-info/RECORD"]
    with zipfile.ZipFile(wheel, "w") as made:
        for name in names:
            made.writestr(name, name)
    wheels["keep_one_library"](wheel, "130")
    with zipfile.ZipFile(wheel) as left:
        assert left.namelist() == [name for name in names if "cuda128" not in name]
        assert "cuda128" not in left.read(names[-1]).decode()
    with pytest.raises(SystemExit, match="no library for CUDA 118"):
        wheels["keep_one_library"](wheel, "118")


def test_what_a_wheel_needs_is_read_from_it(tmp_path: Path) -> None:
    wheels = runpy.run_path(str(BENCHMARKS / "gpu_wheels.py"))
    lines = ["one>=2", "two; python_version < '3.11'", "three; python_version >= '3.12'", "four; extra == 'more'"]
    with zipfile.ZipFile(wheel := tmp_path / "it-1-py3-none-any.whl", "w") as made:
        made.writestr("it-1.dist-info/METADATA", "\n".join(["Name: it", *(f"Requires-Dist: {line}" for line in lines)]))
    assert wheels["needs"](wheel, "312") == ["one", "three"]
    assert wheels["needs"](wheel, "310") == ["one", "two"]
