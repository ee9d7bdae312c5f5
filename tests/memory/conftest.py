"""The fixtures of tests that estimate a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_fixtures import make_yaml, own_cache, two_blocks as model_folder

__all__ = ["make_config", "make_yaml", "model_folder", "own_cache"]


@pytest.fixture
def make_config(make_yaml: Callable[..., Path]) -> Callable[..., Any]:
    """The same, loaded."""
    from trimtab.config.read import load_config

    return lambda *said, **sections: load_config(make_yaml(*said, **sections))
