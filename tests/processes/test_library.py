"""Adapted models in a loop of one's own over two processes: what they compute, and what is saved, read and merged."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize("how", ["ddp", "fsdp", "late"])
def test_two_processes_compute_save_and_merge_as_one(how: str, told: dict[str, list[Any]]) -> None:
    for differences in told[how]:
        assert "error" not in differences, differences
        assert all(difference < 2e-6 for difference in differences.values()), differences


def test_a_tensor_parallel_plan_is_refused_in_words(told: dict[str, list[Any]]) -> None:
    for said in told["tp"]:
        assert said["error"] == "SurgeryError"
        assert "tensor-parallel plan" in said["said"]
        assert "fully_shard" in said["said"]
