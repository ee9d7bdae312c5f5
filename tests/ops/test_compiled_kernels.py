"""Triton's programs are compiled for GPUs that are not here, as our layers start them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sampling

TOOL = Path(__file__).parents[1] / "tools" / "compiled_kernels.py"
EVERY = [
    *([name, rank, part] for name in ("bfloat16", "float16", "float32") for rank in (16, 32) for part in (80, 90)),
]
SHARED, REGISTERS = {80: 163 * 1024, 90: 227 * 1024}, 65_536
SPILLED = {"bfloat16": 0, "float16": 0, "float32": 32}
"""Bytes a thread at most: in float32 a handful of registers, which is nothing beside what a block moves."""


def test_the_programs_compile_for_gpus_and_fit_their_multiprocessors() -> None:
    """Registers, shared memory and spills are in the message of a failure; the tool by itself prints them all."""
    pytest.importorskip("triton", reason="triton is not installed, so its programs cannot be compiled")
    cases = EVERY if sampling.everything else [["bfloat16", 16, 80], ["bfloat16", 16, 90]]
    done = subprocess.run([sys.executable, TOOL, json.dumps(cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(row["dtype"], row["rank"], row["architecture"]) for row in rows} == {tuple(case) for case in cases}
    for row in rows:
        assert row["spilled"] <= SPILLED[row["dtype"]], row
        assert row["shared"] <= SHARED[row["architecture"]] / 2, row
        assert row["registers"] * 32 * row["warps"] <= REGISTERS, row
