"""Adapters whose configuration is damaged, or made to do harm: each ends in an AdapterError, soon, and the model is
what it was."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import trimtab
from adapter_tools import (
    OUR_FILES,
    PEFT_FILES,
    SECONDS,
    adapter_tensors,
    assert_unchanged,
    edit_json,
    edit_tensors,
    forge,
    read_json,
    refused,
    same_tensors,
    state_of,
    trained,
)
from sampling import sample
from trimtab import AdapterError, Rule
from trimtab.adapters import safe_read
from trimtab.adapters.formats import _peft_config

pytestmark = pytest.mark.timeout(60)

Make = Callable[..., Any]
Mutation = Callable[[Path, Path], object]  # configuration, tensors
Q0 = "model.layers.0.self_attn.q_proj"


# The configuration --------------------------------------------------------------------------------------------------


def text(make: Callable[[str], str]) -> Mutation:
    return lambda config, tensors: config.write_text(make(config.read_text("utf-8")), "utf-8")


def data(make: Callable[[bytes], bytes]) -> Mutation:
    return lambda config, tensors: config.write_bytes(make(config.read_bytes()))


def more(entry: str) -> Mutation:
    """One more entry in front of the others."""
    return text(lambda old: old.replace("{", "{" + entry + ",", 1))


CONFIGURATIONS: dict[str, Mutation] = {
    "empty": text(lambda old: ""),
    "a space": text(lambda old: " "),
    "cut": text(lambda old: old[: len(old) // 2]),
    "twice": text(lambda old: old + old),
    "null": text(lambda old: "null"),
    "a list": text(lambda old: f"[{old}]"),
    "a text": text(lambda old: json.dumps(old)),
    "a number": text(lambda old: "17"),
    "no entries": text(lambda old: "{}"),
    "not UTF-8": data(lambda old: old.replace(b"{", b'{"\xff\xfe": 1,', 1)),
    "UTF-16": data(lambda old: old.decode().encode("utf-16")),
    "a null byte": data(lambda old: b"\0" + old),
    "a pickle": data(lambda old: pickle.dumps(old)),
    "NaN": more('"x": NaN'),
    "infinity": more('"x": -Infinity'),
    "more than a number holds": more('"x": 1e999'),
    "a large number": more('"x": 100000000000000000000'),
    "a number of ten thousand digits": more('"x": ' + "1" * 10_000),
    "a key twice": more('"x": 1, "x": 1'),
    "its own kind twice": more('"peft_type": "LORA", "format": "trimtab adapter"'),
    "a key twice, deep inside": more('"x": [{"y": {"z": 1, "z": 2}}]'),
    "deep": more('"x": ' + "[" * 100_000 + "]" * 100_000),
    "deep in objects": more('"x": ' + '{"x":' * 100_000 + "1" + "}" * 100_000),
    "open brackets": text(lambda old: "[" * 1_000_000),
}


@pytest.mark.parametrize("mutation", CONFIGURATIONS)
def test_spoiled_configurations(mutation: str, good: tuple[Path, Path], tiny_llama: Make) -> None:
    CONFIGURATIONS[mutation](*good)
    refused(tiny_llama(), good[0].parent)


@pytest.mark.parametrize("depth", sample([100, 400, 800, 900, 950, 990], every=3, always=[990]))
def test_depths_about_the_limit_of_recursion(depth: int, good: tuple[Path, Path], tiny_llama: Make) -> None:
    """Where reading still goes well, and what follows might not."""
    nested = "[" * depth + "]" * depth
    key = "modules" if good[0].name == OUR_FILES[0] else "rank_pattern"
    described = {**read_json(good[0]), key: "HERE"}
    good[0].write_text(json.dumps(described).replace('"HERE"', nested), "utf-8")
    refused(tiny_llama(), good[0].parent)


def test_a_configuration_of_gigabytes(good: tuple[Path, Path], tiny_llama: Make) -> None:
    with good[0].open("r+b") as file:
        file.truncate(8 * 2**30)  # a hole: nothing is written
    refused(tiny_llama(), good[0].parent, "larger than")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_configuration_that_is_no_file(kind: str, good: tuple[Path, Path], tiny_llama: Make) -> None:
    good[0].unlink()
    good[0].mkdir() if kind == "folder" else os.mkfifo(good[0])
    refused(tiny_llama(), good[0].parent, "no adapter here")


def test_places_that_are_no_folders(good: tuple[Path, Path], tiny_llama: Make, tmp_path: Path) -> None:
    for place in (good[0], tmp_path / "nowhere", Path("/dev/null"), tmp_path / ("x" * 300)):
        before = state_of(model := tiny_llama())
        with pytest.raises(AdapterError):
            trimtab.load_adapter(model, place)
        assert_unchanged(model, before)
    (tmp_path / "empty").mkdir()
    refused(tiny_llama(), tmp_path / "empty", "no adapter here")


# PEFT's configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [10**9, 2**53, 2**62, 10**400])
def test_a_rank_without_end_takes_no_memory(rank: int, theirs: Path, tiny_llama: Make) -> None:
    edit_json(theirs / PEFT_FILES[0], r=rank)
    refused(tiny_llama(), theirs)


BOMBS = [
    "(a+)+$",
    "((a|ab)*)*(?:c|d)$",
    "(.*)*(?:!|@)$",
    ".*.*.*.*.*.*.*.*.*.*(?:!|@)$",
    "([a-z]*)*(?:!|@)$",
    "(a|a|a|a)*(?:!|@)$",
    "(?:a?){40}" + "a" * 40,
    "(a{9999}){9999}",
    "((((a{999}){999}){999}){999})",
    "(" * 900 + "a" + ")" * 900,
    "a" * 100_000,
    "(?R)",
    "(?:a){e<=9}",
    r"(a+)\2+$",
]


@pytest.mark.parametrize("bomb", sample(BOMBS, every=3), ids=lambda bomb: bomb[:25])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_without_end(
    key: str, bomb: str, theirs: Path, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_peft_config, "_SECONDS_FOR_PATTERNS", 0.3)
    # The attacker picks the names of the modules, too.
    name = "base_model.model." + "a" * 200
    edit_tensors(theirs / PEFT_FILES[1], {f"{name}.lora_A.weight": torch.zeros(2, 4)})
    edit_json(theirs / PEFT_FILES[0], **{key: {bomb: 2}})
    refused(tiny_llama(), theirs)


@pytest.mark.parametrize(
    "pattern", ["a" * 1001, "(?:a|b)" * 10_000, "(a{999}){101}", "((a{50}){3,70}){30}", "(?:a|b){,200000}"], ids=len
)
def test_patterns_that_would_take_long_to_read_are_not_read(pattern: str, theirs: Path, tiny_llama: Make) -> None:
    edit_json(theirs / PEFT_FILES[0], rank_pattern={pattern: 2})
    refused(tiny_llama(), theirs, "is too long, or counts repeats that make it so")


def test_patience_is_shared_by_all_names(theirs: Path, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peft_config, "_SECONDS_FOR_PATTERNS", 0.3)
    slow = {f"base_model.model.{number}{'a' * 200}.lora_A.weight": torch.zeros(2, 4) for number in range(300)}
    edit_tensors(theirs / PEFT_FILES[1], dict(slow))
    edit_json(theirs / PEFT_FILES[0], alpha_pattern={"[0-9]*(a|a|a|a)*(?:!|@)$": 2})
    refused(tiny_llama(), theirs)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda said: "{",
    "a list": lambda said: [said],
    "nothing": lambda said: {},
    "NaN": lambda said: json.dumps(said).replace("null", "NaN", 1),
    "deep": lambda said: "[" * 100_000,
    "a module twice": lambda said: json.dumps(said).replace("{", '{"' + Q0 + '": {},', 1),
    "a text for a module": lambda said: said | {Q0: "dora"},
    "no options": lambda said: said | {Q0: {"method": "dora"}},
    "unknown options": lambda said: said | {Q0: {"method": "dora", "options": {"rank": 2, "evil": 1}}},
    "another method": lambda said: said | {Q0: {"method": "full", "options": {}}},
    "no method of ours": lambda said: said | {Q0: {"method": "../evil", "options": {}}},
    "another axis": lambda said: said | {Q0: {"method": "dora", "options": {"rank": 2, "magnitude_axis": "input"}}},
    "another scale": lambda said: said | {Q0: {"method": "dora", "options": {"rank": 2, "alpha": 5}}},
    "one module more": lambda said: said | {"lm_head": said[Q0]},
    "one module less": lambda said: {name: one for name, one in said.items() if name != Q0},
}


@pytest.mark.parametrize("header", HEADERS)
def test_hostile_headers_in_peft_s_layout(header: str, tiny_llama: Make, tmp_path: Path) -> None:
    trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.q_proj", method="dora", rank=2)), tmp_path)
    with safe_open(tmp_path / PEFT_FILES[1], framework="pt") as file:
        said = HEADERS[header](json.loads(file.metadata()["trimtab"]))
    text = said if isinstance(said, str) else json.dumps(said)
    edit_tensors(tmp_path / PEFT_FILES[1], header={"format": "pt", "trimtab": text})
    refused(tiny_llama(), tmp_path)


# Our configuration, forged with the right hash ----------------------------------------------------------------------


def test_a_forged_hash_is_taken(ours: Path, tiny_llama: Make) -> None:
    """So that what follows tests what it says: the hash binds two files together, and keeps nobody out."""
    forge(ours, lambda modules: modules[Q0]["options"].update(alpha=9))
    model = tiny_llama()
    trimtab.load_adapter(model, ours)
    assert model.get_submodule(Q0).adapter.options.alpha == 9
    edit_json(ours / OUR_FILES[0], modules=read_json(ours / OUR_FILES[0])["modules"] | {"x": {}})
    refused(tiny_llama(), ours, "do not belong together")


@pytest.mark.parametrize(
    "method",
    [
        *("../evil", "os", "_method", "..evil", "lora.py", "trimtab.methods.lora", "__init__", "", "LORA"),
        *(None, 7, True, ["lora"], {"lora": 1}, "a" * 100_000, "lora\0", "\x1b[2J"),
    ],
    ids=lambda method: ascii(method)[:20],
)
def test_a_method_is_a_file_of_ours_or_nothing(
    method: Any, ours: Path, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[str] = []
    monkeypatch.setattr("importlib.import_module", lambda name, *_: imported.append(name))
    forge(ours, lambda modules: modules[Q0].update(method=method))
    refused(tiny_llama(), ours, "damaged description")
    assert set(imported) <= {"trimtab.methods.dora", "trimtab.methods.mora"}


def options(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda modules: modules[Q0]["options"].update(changes)


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(modules: dict[str, Any]) -> None:
        modules[Q0] = {key: value for key, value in (modules[Q0] | changes).items() if value != "GONE"}

    return change


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown option": options(evil=1),
    "options that are arguments": options(self=1, match="*", method="full"),
    "a rank without end": options(rank=10**9),
    "a rank beyond numbers": options(rank=2**53),
    "a rank below nothing": options(rank=-1),
    "a rank in words": options(rank="many"),
    "no rank": options(rank=None),
    "a scale below nothing": options(alpha=-1.0),
    "an axis of its own": options(magnitude_axis="diagonal"),
    "a dtype of its own": options(dtype="int8"),
    "a dropout of all": options(dropout=1.0),
    "no magnitude": options(magnitude=False),
    "options that are a list": entry(options=[1]),
    "options that are a text": entry(options="rank"),
    "no options": entry(options="GONE"),
    "no method": entry(method="GONE"),
    "no tensors": entry(tensors="GONE"),
    "tensors that are a list": entry(tensors=["A", "B", "magnitude"]),
    "shapes that are numbers": entry(tensors={"A": 2, "B": 2, "magnitude": 2}),
    "shapes that are texts": entry(tensors={"A": "ab", "B": "ab", "magnitude": "a"}),
    "other shapes": entry(tensors={"A": [3, 16], "B": [16, 2], "magnitude": [16]}),
    "a tensor with a path": entry(tensors={"../A": [2, 16], "B": [16, 2], "magnitude": [16]}),
    "fewer tensors": entry(tensors={"A": [2, 16], "B": [16, 2]}),
    "no shape": entry(shape="GONE"),
    "a shape in words": entry(shape="wide"),
    "a shape that is a number": entry(shape=16),
    "another shape": entry(shape=[16, 17]),
    "an entry that is a list": lambda modules: {**modules, Q0: []},
    "an entry that is nothing": lambda modules: {**modules, Q0: None},
    "an entry that is a text": lambda modules: {**modules, Q0: "dora"},
    "modules that are a list": lambda modules: list(modules),
    "modules that are pairs": lambda modules: [[name, one] for name, one in modules.items()],
    "modules that are a text": lambda modules: "modules",
    "modules that are a number": lambda modules: 7,
    "another method": entry(method="full"),
}


@pytest.mark.parametrize("change", FORGED)
def test_forged_descriptions(change: str, ours: Path, tiny_llama: Make) -> None:
    forge(ours, FORGED[change])
    refused(tiny_llama(), ours)


@pytest.mark.parametrize("rank", [10**9, 2**53])
def test_ranks_without_end_of_other_methods(rank: int, tiny_llama: Make, tmp_path: Path) -> None:
    trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.q_proj", method="mora", rank=2)), tmp_path)
    forge(tmp_path, lambda modules: modules[Q0]["options"].update(rank=rank))
    refused(tiny_llama(), tmp_path)


def test_no_modules_at_all(ours: Path, tiny_llama: Make) -> None:
    forge(ours, lambda modules: {}, change=dict.fromkeys(load_file(ours / OUR_FILES[1])))
    refused(tiny_llama(), ours, "is empty")


@pytest.mark.parametrize("said", ["trimtab", "TRIMTAB ADAPTER", "another adapter", None, 1, ["trimtab adapter"]])
def test_other_formats(said: Any, ours: Path, tiny_llama: Make) -> None:
    edit_json(ours / OUR_FILES[0], format=said)
    refused(tiny_llama(), ours, "this is not an adapter of ours")


@pytest.mark.parametrize("version", [2, 0, -1, 1.5, "1", None, [1], 2**40])
def test_other_versions(version: Any, ours: Path, tiny_llama: Make) -> None:
    edit_json(ours / OUR_FILES[0], version=version)
    refused(tiny_llama(), ours, r"this release reads version 1\. Update trimtab")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../q", "model", "model.layers", "a." * 200 + "q", "q_proj", "\x1b[2J"]
)
def test_modules_that_are_not_there(name: str, ours: Path, tiny_llama: Make) -> None:
    forge(
        ours,
        lambda modules: {name: modules[Q0]},
        change={key: None for key in load_file(ours / OUR_FILES[1]) if not key.startswith(f"{Q0}.")},
        rename={f"{Q0}.{key}": f"{name}.{key}" for key in ("A", "B", "magnitude")},
    )
    refused(tiny_llama(), ours)


def test_a_model_that_is_itself_the_layer(tmp_path: Path) -> None:
    """The name of the model as a module of its own is empty; a layer cannot be replaced inside itself."""
    trimtab.save_adapter(
        trained(nn.ModuleDict({"q": nn.Linear(4, 4)}), Rule(match="q", method="mora", rank=1)), tmp_path
    )
    refused(nn.Linear(4, 4), tmp_path)
    forge(tmp_path, lambda modules: {"": modules["q"]}, rename={"q.M": ".M"})
    refused(nn.Linear(4, 4), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("exists", [False, pytest.param(True, marks=pytest.mark.full)])
def test_modules_by_the_thousand(exists: bool, tiny_llama: Make, tmp_path: Path) -> None:
    """Nothing grows with the square of their number: not the search for names, nor the patterns."""
    count = 1000

    def make() -> nn.Module:
        return nn.ModuleDict({f"m{number}": nn.Linear(2, 2, bias=False) for number in range(count)})

    model = trained(make(), Rule(match="all-linear", method="lora", rank=1), Rule(match="m7*", method="lora", rank=2))
    for files in (PEFT_FILES, OUR_FILES):
        if files is OUR_FILES:
            trimtab.detach(model)
            trained(model, Rule(match="all-linear", method="mora", rank=1, form="sharing"))
        trimtab.save_adapter(model, tmp_path)
        assert (tmp_path / files[0]).is_file()
        start = time.monotonic()
        if exists:
            fresh = make()
            trimtab.load_adapter(fresh, tmp_path)
            assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))
        else:
            refused(tiny_llama(), tmp_path, f"{count} of its {count} modules are not in this one")
        assert time.monotonic() - start < 2 * SECONDS


# The reader itself --------------------------------------------------------------------------------------------------


def test_names_as_messages_show_them() -> None:
    assert safe_read.shown("model.layers.0") == "model.layers.0"
    assert safe_read.shown("späť") == "späť"
    assert safe_read.shown("a\x1b[2J") == r"'a\x1b[2J'"
    assert safe_read.shown("\ud800") == r"'\ud800'"
    assert len(safe_read.shown("a" * 10_000)) == 123
    assert len(safe_read.shown("\x07" * 10_000)) == 123


def test_numbers_that_are_taken() -> None:
    text = '{"a": [0, -1, 9007199254740992, 1.5, 1e-9, -0.0, true, null, "x"], "b": {"a": {}}}'
    assert safe_read.parse_description(text) == json.loads(text)
    for number in ("9007199254740993", "-9007199254740993", "1e309", "NaN", "Infinity"):
        with pytest.raises(ValueError, match=r"too large|not a finite"):
            safe_read.parse_description(f'{{"a": {number}}}')
