"""How many launches an adapter adds to a layer on a device, and what it keeps for the backward pass: bounded, so that
neither grows unseen. ``python benchmarks/traffic.py`` prints the same for a whole block."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from traffic import METHODS, _attention, block, by_rows, measure

TOKENS, WIDTH = 4096, 4096
VECTORS = 4 * 4 * WIDTH
"""Bytes of a norm, a ratio and a divisor for each output in float32, and some room."""
FACTOR = 2 * TOKENS * 16
"""Bytes of ``x A^T`` in bfloat16 at rank 16. One output is 256 times as large."""


@pytest.mark.parametrize(
    ("method", "most", "kept"),
    [
        ("frozen", 2, 0),
        ("lora", 20, FACTOR),
        ("dora", 41, FACTOR + VECTORS),
        ("mora", 50, 0),
        ("mora, magnitude", 165, VECTORS),
    ],
)
def test_an_adapter_adds_few_launches_and_keeps_no_output(method: str, most: int, kept: int) -> None:
    launches, bytes_kept, *_ = measure(METHODS[method], TOKENS, shapes=[(WIDTH, WIDTH)], kernels="plain")
    assert launches <= most
    assert bytes_kept <= kept


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_launches_do_not_grow_with_the_batch(method: str) -> None:
    few = measure(METHODS[method], 1024, shapes=[(1024, 1024)], kernels="plain").launches
    many = measure(METHODS[method], 65536, shapes=[(1024, 1024)], kernels="plain").launches
    assert many <= few + 2, "a form for many tokens takes a launch or two more, not one for each part of a weight"


@pytest.mark.parametrize(
    ("method", "most"),
    [
        *(("lora", 11), ("lora, dropout", 14), ("dora", 15), ("dora, dropout", 19)),
        *(("mora", 30), ("mora, magnitude", 36)),
    ],
)
def test_fused_passes_are_one_launch_each(method: str, most: int) -> None:
    pytest.importorskip("triton")
    launches, bytes_kept, *_ = measure(METHODS[method], TOKENS, shapes=[(WIDTH, WIDTH)], kernels="triton")
    assert launches <= most
    assert bytes_kept <= FACTOR + VECTORS


@pytest.mark.parametrize(
    ("methods", "trains", "most"),
    [
        *((["dora"], False, 3), (["lora", "dora", "mora"], False, 5)),
        *((["lora"], True, 10), (["dora"], True, 48), (["mora"], True, 13)),
    ],
    ids=str,
)
def test_eight_adapters_in_one_batch_share_their_launches(methods: list[str], trains: bool, most: int) -> None:
    """(In training, each norm takes its own.)"""
    pytest.importorskip("triton")
    assert by_rows(methods, 64, 1, segments=True, trains=trains).launches <= most


@pytest.mark.full
def test_the_page_of_the_kernels_says_what_is_counted() -> None:
    pytest.importorskip("triton")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("counted", _attention)
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "kernels.md").read_text("utf-8")
    pair = r"([\d.]+) / ([\d.]+) \|"
    lines = re.findall(rf"^\| ([\w, ]+) \| {pair} {pair} {pair}$", page, re.MULTILINE)
    assert {name.lower() for name, *_ in lines} == METHODS.keys() - {"frozen"}
    floor = block(None, TOKENS, kernels="plain").seconds
    for name, *told in lines:
        said = {**METHODS[name.lower()], "rank": 16}
        plain, triton = (block(said, TOKENS, kernels=kernels) for kernels in ("plain", "triton"))
        counted = [f"{one.launches}" for one in (plain, triton)]
        counted += [f"{one.seconds / floor:.2f}" for one in (plain, triton)]
        counted += [f"{one.kept / 2**20:.0f}" for one in (plain, triton)]
        assert told == counted, name
