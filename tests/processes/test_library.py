"""Adapted models in a loop of one's own over two processes: what they compute, and what is saved, read and merged."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from two_processes import both, library

WAYS = ("ddp", "fsdp", "tp")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    root = tmp_path_factory.mktemp("library")
    return both({how: partial(library, root=str(root), how=how) for how in WAYS}, root)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_compute_save_and_merge_as_one(how: str, found: dict[str, list[Any]]) -> None:
    for differences in found[how]:
        assert "error" not in differences, differences
        assert all(difference < 2e-6 for difference in differences.values()), differences


def test_a_tensor_parallel_plan_is_refused_in_words(found: dict[str, list[Any]]) -> None:
    for said in found["tp"]:
        assert said["error"] == "SurgeryError"
        assert "tensor-parallel plan" in said["said"]
        assert "fully_shard" in said["said"]
