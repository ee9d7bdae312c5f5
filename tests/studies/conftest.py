"""The fixtures of tests of studies: tiny models in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_fixtures import bare_runs, here, make_yaml, model_folder, own_cache

__all__ = ["bare_runs", "here", "make_config", "make_yaml", "model_folder", "own_cache"]


@pytest.fixture
def make_config(make_yaml: Callable[..., Path]) -> Callable[..., Any]:
    """A run's configuration, loaded."""
    from trimtab.config.read import load_config

    return lambda *said, **sections: load_config(make_yaml(*said, **sections))
