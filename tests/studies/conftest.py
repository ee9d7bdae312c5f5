"""The fixtures of tests of studies: tiny models in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_fixtures import make_yaml, model_folder, own_cache

__all__ = ["make_config", "make_yaml", "model_folder", "own_cache"]


@pytest.fixture
def make_config(make_yaml: Callable[..., Path]) -> Callable[..., Any]:
    """A run's configuration, loaded."""
    from trimtab.config.read import load_config

    return lambda *said, **sections: load_config(make_yaml(*said, **sections))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process: quicker, where what a process of their own gives is not what is tested."""
    from trimtab.errors import Interrupted, RunError, TrimtabError
    from trimtab.studies.process import run_here

    def run(config: Any, listener: Any) -> None:
        try:
            run_here(config, listener)
        except Interrupted:
            raise
        except TrimtabError as error:
            raise RunError(str(error)) from None

    monkeypatch.setattr("trimtab.studies.cell.run_apart", run)
