"""Pages that are made from files and from code: figures from what the benchmarks wrote, other tools' keys from the
readers of their configurations."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "figures.py"))


def test_the_chart_is_drawn_from_the_results(figures: dict[str, Any]) -> None:
    for path, drawn in figures["charts"]().items():
        assert path.read_text("utf-8") == drawn, f"{path.name}: python benchmarks/figures.py --chart"
        assert {"611 s", "1,681 s"} <= set(re.findall(r">([\d,.]+ s)<", drawn))


def test_a_table_has_the_medians_of_its_benchmark(figures: dict[str, Any]) -> None:
    found = figures["results"]("finance")["runs"]
    seconds = [found[arm][0]["seconds"] for arm in ("trimtab", "peft")]
    line = next(line for line in figures["TABLES"]["finance"]().splitlines() if line.startswith("| seconds"))
    assert line == f"| seconds | {seconds[0]:,.0f} | {seconds[1]:,.0f} | {seconds[0] / seconds[1]:.2f} |"


def test_every_table_is_whole_and_on_a_page(figures: dict[str, Any]) -> None:
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs").rglob("*.md"))
    for name, table in figures["TABLES"].items():
        lines = table().splitlines()
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1, name
        assert f"<!-- figures: {name} -->" in pages


def test_every_tool_that_is_read_has_a_page_with_its_keys() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "hooks" / "others.py"))["pages"]()
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert len(pages) >= 4
    for place, text in pages.items():
        assert place in nav
        assert re.search(r"^\| `\w+` \| `plan: rank` \|$|`lora_parameters`", text, re.MULTILINE), place
    axolotl = pages["reference/from-axolotl.md"]
    assert "| `micro_batch_size` | `train.batch_size` |" in axolotl
    assert "| `train.schedule` | `cosine` |" in axolotl
    assert "| `sample_packing` | rows are not packed" in axolotl
