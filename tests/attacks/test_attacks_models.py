"""Model folders made to do harm: numbers without end, files that are none, files elsewhere, names that are twice; and
adapters whose values are no numbers. Each is told, soon, with exit code 1."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_tools import OUR_FILES, PEFT_FILES, refused
from command_line import Result
from trimtab.data.tokens import encode_prompt
from trimtab.errors import DataError, ModelError
from trimtab.models import load
from trimtab.models.load import load_model
from trimtab.models.locate import locate
from trimtab.models.model_files import Weights, load_config_only, load_tokenizer
from trimtab.runs.load import load_fitting

Make = Callable[..., Any]
# Time that is over may be told first to a callback of the garbage collector, which drops it; it is told again.
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | keys), "utf-8")


def load_all(folder: Path) -> None:
    load_tokenizer(locate(str(folder)))
    load_fitting(locate(str(folder)), "float32")


def not_loaded(folder: Path, match: str) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match=match) as caught:
        load_all(folder)
    assert time.monotonic() - start < 20
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1500


MODEL_FILES = ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"]
SIZES: dict[str, dict[str, Any]] = {
    "a width of a thousand million": {"hidden_size": 10**9},
    "a million layers": {"num_hidden_layers": 10**6},
    "no layers": {"num_hidden_layers": 0},
    "fewer layers than none": {"num_hidden_layers": -3},
    "layers in words": {"num_hidden_layers": "many"},
    "half a layer": {"num_hidden_layers": 2.5},
    "a width below nothing": {"hidden_size": -32},
    "a vocabulary of a million million": {"vocab_size": 10**12},
    "a vocabulary below nothing": {"vocab_size": -1},
    "no heads": {"num_attention_heads": 0},
    "a thousand million heads": {"num_attention_heads": 10**9},
    "no key heads": {"num_key_value_heads": 0},
    "a thousand million labels": {"num_labels": 10**9},
    "a width that is no number": {"hidden_size": float("nan")},
    "an epsilon that is no number": {"rms_norm_eps": float("nan")},
    "no number deep inside": {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
    "a number of thousands of digits": {"hidden_size": 10**4000},
    "an activation of Python": {"hidden_act": "os.system"},
    "an architecture of its own": {"model_type": "evil"},
    "code of its own": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
}


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_that_no_model_has(kind: str, folder: Path) -> None:
    change(folder / "config.json", **SIZES[kind])
    not_loaded(folder, ".")


def test_a_model_whose_making_does_not_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever in a configuration makes it so: the time is bounded."""
    monkeypatch.setattr(load, "_SECONDS", 0.5)
    change(folder / "config.json", num_hidden_layers=10_000)
    with pytest.raises(ModelError, match=r"takes more than 0\.5 seconds"):
        load_fitting(locate(str(folder)), "float32")


TEXTS = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "a key twice": '{"hidden_size": 32, "hidden_size": 64}',
    "deep": '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "not UTF-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_texts_that_are_none(kind: str, name: str, folder: Path) -> None:
    text = TEXTS[kind]
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    not_loaded(folder, rf"{name}: (cannot be read as JSON|expected an object)")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "extra.json",
        "model.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_is_no_file(kind: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a pipe, and nothing reads a device to its end."""
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(folder)  # the name of a socket may not be long
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    not_loaded(folder, r"and not a file|is there|without config\.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_links_to_themselves_and_folders(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    not_loaded(folder, ".")
    (folder / name).unlink()
    (folder / name).mkdir()
    not_loaded(folder, ".")


@pytest.mark.parametrize("part", ["../other/model.safetensors", "/etc/passwd", "x/../../y.safetensors", "..", "a\0b"])
def test_weights_outside_of_the_folder(part: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder.parent / "other").mkdir()
    save_file(tensors, folder.parent / "other" / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, part)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ModelError, match="names a file outside of its folder"):
        load_model(locate(str(folder)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_model(locate(str(folder)))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(file: Path, header: str | bytes, rest: bytes, length: int | None = None) -> None:
    text = header.encode() if isinstance(header, str) else header
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + rest)


def twice(header: dict[str, Any]) -> str:
    """The same with its first tensor twice, at one place: the library takes the second without a word."""
    name = next(name for name in header if name != "__metadata__")
    return "{" + f"{json.dumps(name)}: {json.dumps(header[name])}, " + json.dumps(header)[1:]


def moved(header: dict[str, Any], by: int) -> str:
    """The same with a tensor that begins earlier (over another) or later (after a hole)."""
    name = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    start, end = header[name]["data_offsets"]
    return json.dumps(header | {name: header[name] | {"data_offsets": [start + by, end + by]}})


def sized(header: dict[str, Any], shape: list[int]) -> str:
    name = next(name for name in header if name != "__metadata__")
    return json.dumps(header | {name: header[name] | {"shape": shape}})


HEADERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "a tensor twice": twice,
    "tensors over each other": lambda header: moved(header, -16),
    "a hole": lambda header: moved(header, 16),
    "a shape without end": lambda header: sized(header, [2**62, 2**62]),
    "a shape below nothing": lambda header: sized(header, [-1, 4]),
    "another shape": lambda header: sized(header, [3, 5]),
    "deep": lambda header: "[" * 100_000,
    "nothing": lambda header: "",
    "a list": lambda header: "[]",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_headers_of_safetensors(kind: str, folder: Path) -> None:
    header, rest = header_of(file := folder / "model.safetensors")
    with_header(file, HEADERS[kind](header), rest)
    not_loaded(folder, "damaged|cannot be loaded|not in its files")
    with pytest.raises(ModelError):
        Weights(folder)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63, 2**64 - 1])
def test_headers_of_another_length(length: int, folder: Path) -> None:
    header, rest = header_of(file := folder / "model.safetensors")
    with_header(file, json.dumps(header), rest, length)
    not_loaded(folder, "damaged safetensors file")


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_headers_of_adapters(kind: str, good: tuple[Path, Path], tiny_llama: Callable[..., Any]) -> None:
    header, rest = header_of(good[1])
    with_header(good[1], HEADERS[kind](header), rest)
    refused(tiny_llama(), good[0].parent, "damaged safetensors file|incomplete|differ|unexpected|missing")


@pytest.mark.parametrize("files", [PEFT_FILES, OUR_FILES])
@pytest.mark.parametrize("place", [0, 1])
def test_pipes_in_an_adapter(
    files: tuple[str, str], place: int, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    for number, name in enumerate(files):
        os.mkfifo(tmp_path / name) if number == place else (tmp_path / name).write_text("{}", "utf-8")
    refused(tiny_llama(), tmp_path)


# Tokenizers ---------------------------------------------------------------------------------------------------------


def replaced(content: str, times: int) -> dict[str, Any]:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [one] * times}


@pytest.mark.parametrize(
    "normalizer",
    [
        replaced("aa", 40),
        replaced("a" * 20_000, 1),
        {"type": "Sequence", "normalizers": [replaced("aaaa", 4)] * 3},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 20_000},
    ],
)
def test_a_tokenizer_that_makes_long_texts(normalizer: dict[str, Any], folder: Path) -> None:
    change(folder / "tokenizer.json", normalizer=normalizer)
    not_loaded(folder, "its normalizer makes more than 10,000 letters of one")


def test_a_tokenizer_that_searches_for_long(folder: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change(folder / "tokenizer.json", pre_tokenizer=split)
    tokenizer = load_tokenizer(locate(str(folder)))
    with pytest.raises(DataError, match="cannot be taken apart"):
        encode_prompt("a" * 60 + "?", tokenizer)


# Values that are no numbers ------------------------------------------------------------------------------------------


@pytest.fixture
def diverged(make_yaml: Callable[..., Path], cli: Callable[..., Result]) -> Path:
    """A run whose adapter holds NaN."""
    yaml = make_yaml(train={"max_steps": 1}, data={"validation": None})
    assert cli("finetune", yaml).code == 0
    file = yaml.with_suffix("") / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))][0, 0] = torch.nan
    from safetensors import safe_open

    with safe_open(file, framework="pt") as known:
        header = known.metadata()
    save_file(tensors, file, metadata=header)
    return yaml.with_suffix("")


def test_an_adapter_of_no_numbers_answers_nothing(
    diverged: Path,
    cli: Callable[..., Result],
    tmp_path: Path,
    model_folder: Path,
) -> None:
    rows = tmp_path / "completion.jsonl"
    for words in (
        ("generate", diverged, "Message: fog"),
        ("evaluate", diverged, "--data", rows),
        ("merge", diverged, tmp_path / "merged"),
        ("evaluate", model_folder, "--data", rows, "--adapter", diverged / "adapter"),
    ):
        result = cli(*words)
        assert result.code == 1, words
        assert result.matches(r"holds NaN or infinity.*[Ll]ower the learning rate"), result.err
    assert not (tmp_path / "merged").exists()
    assert cli("generate", diverged, "Message: fog", "--base").code == 0


def test_the_config_alone_is_looked_at_as_well(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=10**6)
    with pytest.raises(ModelError, match="expected 1 to 10,000"):
        load_config_only(locate(str(folder)))
