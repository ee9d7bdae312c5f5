"""The table, the picture and the page of a memory study, from a hand-made result."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from memory_page import _learnt, arms_table, draw, footnote, write_memory_page
from trimtab.files import write_json

LABELS = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "mora-rotation": "MoRA (rotation)",
          "mora-sharing": "MoRA (sharing)", "mora-magnitude": "MoRA + magnitude"}  # fmt: skip


def arm(contender: str, budget: int | None, means: tuple[float, ...], **changes: Any) -> dict[str, Any]:
    curve = [{"step": 100 * at, "mean": mean, "lowest": mean * 0.8, "highest": mean} for at, mean in enumerate(means)]
    learnt = next((point["step"] for point in curve if point["mean"] > 0.99), None)
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    return {
        "contender": contender, "label": LABELS[contender], "budget": budget, "parameters": 81408,
        "plan": [{"match": "all-linear", "method": "x", "rank": budget}] if budget else [{"method": "full"}],
        "learning_rate": 0.01, "at_edge": None, "seeds": [1, 2, 3], "seconds": 90.0, "diverged": 0, "curve": curve,
        "candidates": [{"learning_rate": rate, "area": 0.4, "final": 0.9, "diverged": False} for rate in (0.01, 0.1)],
        "area": interval, "final": interval | {"mean": means[-1]}, "steps_to_learnt": [learnt] * 3,
        "against_reference": None if contender in ("full", "lora") else {"mean": -0.02, "low": -0.1, "high": 0.06},
        **changes,
    }  # fmt: skip


@pytest.fixture
def found() -> dict[str, Any]:
    arms = [arm("full", None, (0.0, 0.9, 1.0, 1.0))]
    for budget in (4, 32):
        arms += [
            arm("lora", budget, (0.0, 0.1, 0.2, 0.5), at_edge="largest"),
            arm("dora", budget, (0.0, 0.1, 0.2, 0.52)),
            arm("mora-rotation", budget, (0.0, 0.2, 1.0, 1.0)),
        ]
    arms[2]["plan"] = [{"rank": 3}, {"rank": 4}]
    return {
        "study": {"model": "tiny<&>", "blocks": 2, "pairs": 1000, "digits": 8, "batch_size": 32, "steps": 300,
                  "warmup": 20, "seeds": 3, "precision": "bfloat16"},
        "learnt": 0.99, "cells": 42, "seconds": 630.0, "arms": arms,
        "machine": {"cores": 2, "processor": "a processor"}, "versions": {"torch": "2", "transformers": "5"},
    }  # fmt: skip


def test_table(found: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(arms_table(found))
    lines = console.file.getvalue().splitlines()
    assert re.match(r"LoRA +4 +81,408 +0\.01\* +50\.0 ± 10\.0 +50\.0 +never *$", lines[2])
    assert re.match(r"DoRA +3-4 +81,408 +0\.01 +50\.0 ± 10\.0 +52\.0 +never +-2\.0 ± 8\.0$", lines[3])
    assert footnote(found).startswith("* the smallest or the largest rate")
    found["arms"] = found["arms"][2:4]
    assert footnote(found) == ""
    found["arms"][0]["diverged"] = 2
    assert footnote(found).startswith("DoRA, budget of rank 4: 2 of 3 curves diverged")
    assert all("…" not in line for line in lines)


def test_steps_in_words() -> None:
    assert _learnt([260, 240, 1300]) == "240-1,300"
    assert _learnt([240, 240]) == "240"
    assert _learnt([None, 300, 280]) == "280-never"
    assert _learnt([None, None]) == "never"


def test_picture(found: dict[str, Any]) -> None:
    figure = draw(found)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "the cost of LoRA of rank 4: 81,408 parameters", "the cost of LoRA of rank 32: 81,408 parameters",
    ]  # fmt: skip
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimiser steps", "characters right, %")
    said = {text.get_text() for text in axes.texts}
    assert {"full fine-tuning: learnt by 200", "MoRA (rotation): learnt by 200", "LoRA: 50 %", "DoRA: 52 %"} < said
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts if ":" in text.get_text()), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes)), "labels do not overlap"
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 4]
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in drawn}) == 4, "told apart without colour"


@pytest.mark.full
def test_page(found: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "memorize.json", found)
    page = write_memory_page(tmp_path).read_text(encoding="utf-8")
    assert {file.name for file in tmp_path.iterdir()} == {
        "memorize.html", "memorize.json", "memorize.png", "memorize.svg",
    }  # fmt: skip
    assert "tiny&lt;&amp;&gt;" in page
    assert "tiny<&>" not in page
    assert not re.search(r'(src|href)="(?!#)', page), "it needs no network"
    assert page.count("<tr>") == 2 * (1 + 7)
    assert "42 cells, 10 minutes of training" in page.replace("\n", " ")
    first = (tmp_path / "memorize.svg").read_bytes()
    write_memory_page(tmp_path)
    assert (tmp_path / "memorize.svg").read_bytes() == first


def test_full_fine_tuning_alone(found: dict[str, Any]) -> None:
    found["arms"] = found["arms"][:1]
    assert [axes.get_title(loc="left") for axes in draw(found).axes] == ["full fine-tuning"]
