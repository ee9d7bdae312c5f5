"""``make mutants`` puts its faults where it means to."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from trimtab.ops import autocast

TOOLS = Path(__file__).parent / "tools"


def test_functions_are_found_that_the_tests_have_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    import killing

    gc.freeze()
    try:
        found = killing._functions()
    finally:
        gc.freeze()
    name = (autocast.__file__, autocast.autocast_dtype.__qualname__)
    assert found[name] == [autocast.autocast_dtype]
