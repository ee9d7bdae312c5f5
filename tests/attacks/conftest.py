"""Good adapters, for the attacks to spoil: in both layouts, and of every rank of trust."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import trimtab
from adapter_tools import OUR_FILES, PEFT_FILES, edit_tensors, trained
from command_line import cli
from run_fixtures import make_yaml, model_folder, own_cache
from trimtab import Rule

__all__ = ["cli", "good", "make_yaml", "model_folder", "ours", "own_cache", "theirs"]

LAYOUTS = {
    "peft": (PEFT_FILES, [Rule(match=["*.q_proj", "*.v_proj"], method="dora", rank=2)]),
    "ours": (OUR_FILES, [Rule(match="*.q_proj", method="dora", rank=2), Rule(match="*.v_proj", method="mora", rank=2)]),
}


@pytest.fixture
def saved(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of an adapter for ``tiny_llama()`` in a layout: a copy of one that is made once."""

    def copied(layout: str) -> Path:
        made = tmp_path_factory.getbasetemp() / f"good {layout}"
        if not made.exists():
            trimtab.save_adapter(trained(tiny_llama(), *LAYOUTS[layout][1]), made)
        return Path(shutil.copytree(made, tmp_path / layout))

    return copied


@pytest.fixture(params=LAYOUTS)
def good(request: pytest.FixtureRequest, saved: Callable[[str], Path]) -> tuple[Path, Path]:
    """Configuration and tensors of an adapter for ``tiny_llama()``, in each layout."""
    folder, (configuration, tensors) = saved(request.param), LAYOUTS[request.param][0]
    return folder / configuration, folder / tensors


@pytest.fixture
def theirs(saved: Callable[[str], Path]) -> Path:
    """The folder of an adapter as PEFT would have saved it: without our header."""
    folder = saved("peft")
    edit_tensors(folder / PEFT_FILES[1], header={"format": "pt"})
    return folder


@pytest.fixture
def ours(saved: Callable[[str], Path]) -> Path:
    """The folder of an adapter in our own layout."""
    return saved("ours")
