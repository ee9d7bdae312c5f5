"""``make mutants`` puts its faults where it means to."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parent / "tools"


def test_functions_are_found_that_the_tests_have_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    import killing

    # One of its own: what becomes of the library's in a process that has run thousands of tests is no matter here.
    file, made = str(killing.SOURCE / "made_here.py"), dict[str, Any]()
    exec(compile("def frozen(): pass", file, "exec"), made)
    gc.freeze()
    try:
        found = killing._functions()
    finally:
        gc.freeze()
    assert found[file, "frozen"] == [made["frozen"]]
