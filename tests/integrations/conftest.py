"""Tiny models with a folder of their own, so that a base can be found again by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn


@pytest.fixture
def stored_gpt2(tiny_gpt2: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """The folder of a tiny GPT-2."""
    folder = tmp_path / "base"
    model: Any = tiny_gpt2()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def load() -> Callable[..., Any]:
    """Load a causal model from its folder."""
    from transformers import AutoModelForCausalLM

    return lambda folder, **options: AutoModelForCausalLM.from_pretrained(folder, **options)
