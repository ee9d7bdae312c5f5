"""Adapters by their hub ids, from a cache as the hub's own client keeps it; nothing is fetched here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import trimtab
from adapter_tools import PEFT_FILES, adapter_tensors, assert_unchanged, same_tensors, state_of, trained
from trimtab import AdapterError, Rule
from trimtab.adapters.placing import local_folder

Make = Callable[..., Any]
NAME = "somebody/tiny-adapter"


@pytest.fixture
def cached(tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """An adapted model, and the folder of its adapter in the hub's cache, with the network off."""
    cache, commit = tmp_path / "cache", "0" * 40
    folder = cache / "models--somebody--tiny-adapter" / "snapshots" / commit
    model = trained(tiny_llama(), Rule(match="*.q_proj", method="dora", rank=2))
    trimtab.save_adapter(model, folder)
    refs = folder.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return model, folder


def test_a_hub_id_is_read_from_the_cache(cached: tuple[Any, Path], tiny_llama: Make) -> None:
    model, folder = cached
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, NAME)
    assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))
    assert local_folder(NAME) == folder


def test_a_folder_of_that_name_wins(cached: tuple[Any, Path], tiny_llama: Make) -> None:
    here = trained(tiny_llama(), Rule(match="*.v_proj", method="lora", rank=1))
    trimtab.save_adapter(here, Path(NAME))
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, NAME)
    assert same_tensors(adapter_tensors(fresh), adapter_tensors(here))


@pytest.mark.parametrize("name", ["somebody/something-else", "nobody/x"])
def test_what_cannot_be_fetched_is_told(name: str, cached: tuple[Any, Path], tiny_llama: Make) -> None:
    model = tiny_llama()
    before = state_of(model)
    with pytest.raises(AdapterError, match=rf"{name}: no such folder, and the adapter cannot be fetched from the hub"):
        trimtab.load_adapter(model, name)
    assert_unchanged(model, before)


def test_pickled_weights_on_the_hub_are_not_read(cached: tuple[Any, Path], tiny_llama: Make) -> None:
    shutil.move(cached[1] / PEFT_FILES[1], cached[1] / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"without adapter_model\.safetensors; adapters are read from safetensors"):
        trimtab.load_adapter(tiny_llama(), NAME)


@pytest.mark.parametrize("name", ["adapter", "./somebody/x", "/somebody/x", "a/b/c", "../a/b", "-a/b", "a/-b", "a /b"])
def test_other_names_are_folders(name: str, cached: tuple[Any, Path], tiny_llama: Make) -> None:
    assert local_folder(name) == Path(name)
    with pytest.raises(AdapterError, match="no such folder; expected a folder with"):
        trimtab.load_adapter(tiny_llama(), name)
