"""Configurations that never end, fill the memory, or say what cannot be, each an error of ours with its place, soon."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from sampling import sample
from trimtab.config.others import carry_over
from trimtab.config.read import load_config
from trimtab.config.search import load_explore
from trimtab.config.yaml_text import LONGEST, MOST_VALUES, parse_json, parse_yaml
from trimtab.errors import ConfigError, PlanError
from trimtab.studies.study_cells import load_study
from trimtab.surgery.plan import Rule

pytestmark = pytest.mark.timeout(60)

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "m0: &m0 {a: 1, b: 2}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
HOSTILE = {
    "a billion laughs": LAUGHS + "data: {train: *a11}\n",
    "a billion merges": MERGES,
    "laughs of keys": "a0: &a0 x\n" + "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 40)),
    "a list in itself": "data: &d [*d]\n",
    "a mapping in itself": "data: &d {train: *d}\n",
    "a mapping merged into itself": "data: &d {<<: *d, train: x}\n",
    "two that hold each other": "a: &a {b: &b [*a]}\ndata: *b\n",
    "deep lists": "data: " + "[" * 500 + "]" * 500,
    "very deep lists": "data: " + "[" * 100_000 + "]" * 100_000,
    "deep mappings": "\n".join("  " * depth + "a:" for depth in range(400)),
    "deep in aliases": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 400)),
    "deep in a key": "? " + "[" * 300 + "]" * 300 + "\n: x",
    "a word for a truth": "data: !!bool perhaps",
    "a word for a moment": "data: !!timestamp tomorrow",
    "a word for a number": "data: !!int many",
    "a word for a fraction": "data: !!float much",
    "a word for bytes": "data: !!binary '\u2603'",
    "a list for a truth": "data: !!bool [true]",
    "a list for a mapping": "data: !!map [a]",
    "an empty number": "data: !!int ''",
    "a number of five thousand digits": "data: {max_length: " + "7" * 5_000 + "}",
    "a number of four thousand digits": "data: {max_length: " + "7" * 4_000 + "}",
    "a number in binary": "data: {max_length: 0b" + "1" * 5_000 + "}",
    "a key twice": "data: 1\ndata: 2",
    "a key twice in two words": "data: {yes: 1, true: 2}",
    "a key twice in two bases": "data: {16: 1, 0x10: 2}",
    "two merges": "a: &a {b: 1}\ndata: {<<: *a, <<: *a}",
    "a merge of a number": "data: {<<: 3}",
    "a list as a key": "? [a]\n: b",
    "a mapping as a key": "{{a: b}: c}",
    "a null in a text": 'data: "a\\0b"',
    "half a surrogate pair": 'model: "\\ud800"',
    "a tag of Python": "data: !!python/object/apply:os.system [id]",
    "an unknown tag": "data: !evil x",
    "an unknown anchor": "data: *nowhere",
    "two documents": "data: 1\n---\ndata: 2",
    "control characters": "data: a\x1bb",
    "too many values": "data: [" + "a," * MOST_VALUES + "]",
    "a text without end": "data: '" + "a" * LONGEST + "'",
    "a date as a key": "2024-01-01: x",
    "a number as a key": "17: x",
    "nothing as a key": "? \n: x",
}


def refused(text: str) -> str:
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "run.yaml")
    assert time.process_time() - start < 20
    said = str(caught.value)
    assert said.startswith("run.yaml")
    assert len(said) < 500
    assert "\x1b" not in said
    return said


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if not kind.endswith("as a key") or "l" in kind[:3]])
def test_hostile_texts_are_refused_with_their_line(kind: str) -> None:
    refused(HOSTILE[kind])


@pytest.mark.parametrize("kind", sample(list(HOSTILE), every=5))
@pytest.mark.parametrize("load", [load_config, load_study, load_explore, carry_over])
def test_every_reader_of_configurations_refuses_them(kind: str, load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (file := tmp_path / "run.yaml").write_text(HOSTILE[kind], "utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load(file)


def test_the_line_is_told() -> None:
    assert refused("model: a\ndata: !!bool perhaps").startswith('run.yaml:2: "perhaps" cannot be read as !!bool')
    assert refused("model: a\ndata: !!timestamp x").startswith('run.yaml:2: "x" cannot be read as !!timestamp')
    assert refused(LAUGHS).startswith("run.yaml:5: with its aliases written out, more than 50,000 values")
    assert refused("a: 1\nb: &b [*b]").startswith("run.yaml:2: an alias stands within what it stands for")
    assert refused("a: 1\nb: " + "9" * 5000).startswith('run.yaml:2: "9999')


def test_what_people_write_is_read() -> None:
    assert parse_yaml("a: &a {b: 1, c: [1e-5, 0x10, 2024-01-31]}\nd: {<<: *a, b: 2}\ne: *a", "x")["d"]["b"] == 2
    assert parse_yaml(f"a: {2**64}\nb: {'[' * 50}{']' * 50}", "x")["a"] == 2**64
    many = "\n".join(f"- model.layers.{number}.self_attn.q_proj" for number in range(10_000))
    assert len(parse_yaml(many, "x")) == 10_000


@pytest.mark.parametrize(
    "text", ["[" * 200 + "]" * 200, '{"a": 1, "a": 2}', "9" * 3000, "9" * 5000, '"\\ud800"', "{", "NaN" * 3]
)
def test_hostile_json_of_other_tools(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^x: "):
        parse_json(text, "x")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": ' + text + "}", "utf-8")
    with pytest.raises(ConfigError):
        carry_over(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    "layers", ["outer:" + "9" * 5000, "inner:" + "1" * 5000, "0-" + "9" * 5000, "9" * 5000, "outer:1" + "0" * 6]
)
def test_numbers_of_blocks_without_end(layers: str) -> None:
    with pytest.raises(PlanError, match="expected 'all'"):
        Rule(match="*", method="lora", rank=1, layers=layers)


@pytest.mark.parametrize("model", ["a" * 5000, "~nobody-of-this-name/x"])
def test_paths_that_cannot_be_looked_up(model: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({"model": model, "data": {"train": model}, "output": model}), "utf-8")
    with pytest.raises(ConfigError, match=r"a path cannot be looked up") as caught:
        load_config(tmp_path / "run.yaml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "a loop of links", "a hole of gigabytes", "bytes"])
def test_what_is_no_file_of_text(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    if kind == "a folder":
        file.mkdir()
    elif kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    elif kind == "a loop of links":
        file.symlink_to(file)
    elif kind == "a hole of gigabytes":
        with file.open("wb") as hole:
            hole.truncate(2**33)
    else:
        file.write_bytes(bytes(range(256)) * 20)
    for load in (load_config, load_study, load_explore, carry_over):
        with pytest.raises(ConfigError, match=r"run\.yaml: (cannot be read|expected text)"):
            load(file)
