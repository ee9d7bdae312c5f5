"""Shared fixtures: a fixed seed before every test, and tiny random models. Helper modules beside this file
(``plain_formula``, ``contract_cases``, ...) can be imported by any test."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

# Read when triton is first imported: its programs then run on a processor, number by number.
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case and every long test, as make test-all does")


def pytest_configure(config: pytest.Config) -> None:
    import sampling

    sampling.everything = config.getoption("--all")
    gc.disable()  # what is imported and collected stays: looking through it as it grows takes a quarter of the time


_frozen = 0  # how many modules were loaded when the collector was last told to leave alone what is there


def _freeze() -> None:
    global _frozen
    gc.freeze()
    _frozen = len(sys.modules)


def pytest_collection_finish() -> None:
    """From here on the collector looks through what the tests make, and no more through a million objects besides,
    which takes half a second: every training asks for it at its end."""
    _freeze()
    gc.enable()


def pytest_runtest_setup() -> None:
    """What a test imported stays as well; a trainer and what it needs are a hundred thousand objects."""
    if len(sys.modules) > _frozen + 50:
        gc.collect()
        _freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--all``, tests that are marked ``full`` are left out; one that is named by its address is run."""
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    if "torch" in sys.modules:  # the tests of reports need no torch, and should not have to wait for it
        # Not torch.manual_seed: it also notes a traceback for devices that are not there, which costs milliseconds.
        sys.modules["torch"].default_generator.manual_seed(0)


@pytest.fixture
def tiny_llama() -> Callable[..., nn.Module]:
    """Make a random Llama of two blocks (hidden 16, MLP 24, 2 heads, 1 key head, 40 tokens); keywords go to its
    config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**changes: Any) -> nn.Module:
        sizes = {
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()

    return make


@pytest.fixture
def tiny_gpt2() -> Callable[..., nn.Module]:
    """Make a random GPT-2 of two blocks (width 16, 2 heads, 40 tokens), without dropout; keywords go to its config."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(**changes: Any) -> nn.Module:
        sizes = {
            "vocab_size": 40,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**{**sizes, **quiet, **changes})).eval()

    return make
