"""Good adapters, for the attacks to spoil: in both layouts, and of every rank of trust."""

from __future__ import annotations

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


@pytest.fixture(params=LAYOUTS)
def good(request: pytest.FixtureRequest, tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> tuple[Path, Path]:
    """Configuration and tensors of an adapter for ``tiny_llama()``, in each layout."""
    files, rules = LAYOUTS[request.param]
    folder = trimtab.save_adapter(trained(tiny_llama(), *rules), tmp_path / "adapter")
    return folder / files[0], folder / files[1]


@pytest.fixture
def theirs(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """The folder of an adapter as PEFT would have saved it: without our header."""
    folder = trimtab.save_adapter(trained(tiny_llama(), *LAYOUTS["peft"][1]), tmp_path / "theirs")
    edit_tensors(folder / PEFT_FILES[1], header={"format": "pt"})
    return folder


@pytest.fixture
def ours(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """The folder of an adapter in our own layout."""
    return trimtab.save_adapter(trained(tiny_llama(), *LAYOUTS["ours"][1]), tmp_path / "ours")
