"""A short, fixed sample of what tests/attacks/fuzz.py does for an hour; and what it has found, kept."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sampling import everything

# Time that is over may be told first to a callback of the garbage collector, which drops it; it is told again.
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def _fuzz() -> ModuleType:
    place = Path(__file__).with_name("fuzz.py")
    spec = importlib.util.spec_from_file_location("fuzz", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


fuzz = _fuzz()
RUNS = {"studies": 2, "runs": 8, "yaml": 15, "model": 15, "tokenizer": 15, "whole gguf": 15}
AXOLOTL, FACTORY, MLX, PEFT = (next(iter(files.items())) for files in fuzz.OTHERS)
SEARCH = (Path(__file__).parents[2] / "studies" / "mixing" / "nuance-explore" / "explore.json").read_bytes()
Files = dict[str, bytes]


def changed(file: tuple[str, bytes], old: bytes, new: bytes) -> Files:
    """A good file with a part that is not."""
    assert old in file[1]
    return {file[0]: file[1].replace(old, new)}


FOUND: dict[str, tuple[str, Files]] = {
    "a group without its match": ("study", changed(("explore.yaml", fuzz.EXPLORE_YAML), b'match: ["*.q_proj"]', b"")),
    "a rule's number of 5,000 digits": ("overrides", {"words.txt": b"plan." + b"9" * 5000 + b".rank=8"}),
    "a number for a model": ("others", changed(MLX, b"./here", b"1.5")),
    "a list for a scale": ("others", changed(MLX, b"20.0", b"[]")),
    "a list for parameters": ("others", changed(MLX, b"lora_parameters: {", b"lora_parameters: [1]\nrest: {")),
    "a number among data sets": ("others", changed(AXOLOTL, b"{path: rows.jsonl, type: alpaca}", b".inf")),
    "a data set without a path": ("others", changed(AXOLOTL, b"path: rows.jsonl,", b"")),
    "a number for data sets": ("others", changed(FACTORY, b"dataset: own", b"dataset: 1.5")),
    "a search for no metric": ("studies", {"explore.json": SEARCH.replace(b'"metric": "loss"', b'"metric": ""')}),
    "numbers among modules": ("others", changed(PEFT, b'"v_proj"', b"1.5")),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", fuzz.READERS)
def test_every_reader_ends_as_it_should(name: str) -> None:
    tally = fuzz.Tally()
    fuzz.fuzz(name, (RUNS.get(name, 40)) * (10 if everything else 1), tally, seed=1)
    assert tally.findings == {}
    assert tally.accepted + tally.refused == tally.runs


@pytest.mark.parametrize("name", [name for name in fuzz.READERS if everything or name != "studies"])
def test_the_seeds_are_read_well(name: str) -> None:
    """Else every run would be refused at once, and nothing found."""
    tally = fuzz.Tally()
    for files in fuzz.seeds_of(name):
        fuzz.attempt(fuzz.READERS[name], files, tally)
    assert tally.findings == {}
    assert tally.accepted >= (tally.runs + 1) // 2


@pytest.mark.parametrize("kind", FOUND)
def test_what_was_found_stays_mended(kind: str) -> None:
    reader, files = FOUND[kind]
    fuzz.attempt(fuzz.READERS[reader], files, tally := fuzz.Tally())
    assert tally.findings == {}
    assert tally.refused == 1
