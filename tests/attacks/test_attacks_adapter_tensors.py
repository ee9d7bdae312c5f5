"""Adapters with spoiled tensors: each ends in an AdapterError, soon, and the model is what it was.

A mutation takes the folder of a good adapter and spoils it; all are tried on both layouts.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trimtab
from adapter_tools import (
    PEFT_FILES,
    adapter_tensors,
    assert_unchanged,
    edit_tensors,
    forge,
    refused,
    state_of,
    trained,
)
from trimtab import Rule, SurgeryError

pytestmark = pytest.mark.timeout(60)

Make = Callable[..., Any]
Mutation = Callable[[Path, Path], object]  # configuration, tensors
Q0 = "model.layers.0.self_attn.q_proj"


def test_the_good_adapters_are_good(good: tuple[Path, Path], tiny_llama: Make) -> None:
    model = tiny_llama()
    trimtab.load_adapter(model, good[0].parent)
    assert len(adapter_tensors(model)) == (12 if good[0].name == PEFT_FILES[0] else 8)


# The file of tensors ------------------------------------------------------------------------------------------------


def keep(count: Callable[[bytes], int]) -> Mutation:
    def spoil(config: Path, tensors: Path) -> None:
        data = tensors.read_bytes()
        tensors.write_bytes(data[: count(data)])

    return spoil


def header_length(data: bytes) -> int:
    return int(struct.unpack("<Q", data[:8])[0])


def length_lie(change: Callable[[int], int]) -> Mutation:
    def spoil(config: Path, tensors: Path) -> None:
        data = tensors.read_bytes()
        tensors.write_bytes(struct.pack("<Q", change(header_length(data))) + data[8:])

    return spoil


def header_lie(change: Callable[[dict[str, Any]], None]) -> Mutation:
    """Rewrite the JSON in front of the tensors, its length set right."""

    def spoil(config: Path, tensors: Path) -> None:
        data = tensors.read_bytes()
        length = header_length(data)
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        tensors.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in sorted(header.items()) if key != "__metadata__")


def whole(data: bytes) -> Mutation:
    return lambda config, tensors: tensors.write_bytes(data)


def instead(make: Callable[[Path], object]) -> Mutation:
    """Put something else where the file of tensors was."""

    def spoil(config: Path, tensors: Path) -> None:
        tensors.unlink()
        make(tensors)

    return spoil


class _Bomb:
    """Unpickled, it writes a file where the test will see it."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(os.environ["TRIMTAB_TEST_BOMB"]),))


TENSOR_FILES: dict[str, Mutation] = {
    "gone": lambda config, tensors: tensors.unlink(),
    "empty": keep(lambda data: 0),
    "cut in the length": keep(lambda data: 5),
    "cut after the length": keep(lambda data: 8),
    "cut in the header": keep(lambda data: 8 + header_length(data) // 2),
    "cut after the header": keep(lambda data: 8 + header_length(data)),
    "cut by a byte": keep(lambda data: len(data) - 1),
    "bytes behind the end": lambda config, tensors: tensors.write_bytes(tensors.read_bytes() + b"\0" * 64),
    "length of nothing": length_lie(lambda length: 0),
    "length too small": length_lie(lambda length: length - 9),
    "length too large": length_lie(lambda length: length + 9),
    "length beyond the file": length_lie(lambda length: 10**8),
    "length of exabytes": length_lie(lambda length: 2**63),
    "length of ones": length_lie(lambda length: 2**64 - 1),
    "offsets beyond the file": header_lie(lambda header: first(header).update(data_offsets=[0, 10**12])),
    "offsets backwards": header_lie(lambda header: first(header).update(data_offsets=[64, 0])),
    "offsets below nothing": header_lie(lambda header: first(header).update(data_offsets=[-64, 0])),
    "a shape beyond the bytes": header_lie(lambda header: first(header).update(shape=[10**9, 10**9])),
    "a shape that overflows": header_lie(lambda header: first(header).update(shape=[2**32, 2**32, 2])),
    "a shape below nothing": header_lie(lambda header: first(header).update(shape=[-2, 16])),
    "an unknown dtype": header_lie(lambda header: first(header).update(dtype="F31")),
    "a tensor without a place": header_lie(lambda header: first(header).pop("data_offsets")),
    "a header of another kind": header_lie(lambda header: header.update(__metadata__={"trimtab": 7, "modules": 7})),
    "zeros": whole(b"\0" * 4096),
    "text": whole(b'{"format": "trimtab adapter"}'),
    "a zip file": whole(b"PK\x03\x04" + b"\0" * 4096),
    "not a dictionary": whole(struct.pack("<Q", 2) + b"[]"),
    "deep in brackets": whole(struct.pack("<Q", 10**6) + b"[" * 10**6),
    "a folder": instead(lambda path: path.mkdir()),
    "a pipe": instead(os.mkfifo),
    "a link to nothing": instead(lambda path: path.symlink_to("nowhere")),
    "a link to itself": instead(lambda path: path.symlink_to(path.name)),
    "a link to another file": instead(lambda path: path.symlink_to("/etc/passwd")),
    "a link to random numbers": instead(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("mutation", TENSOR_FILES)
def test_spoiled_files_of_tensors(mutation: str, good: tuple[Path, Path], tiny_llama: Make) -> None:
    TENSOR_FILES[mutation](*good)
    refused(tiny_llama(), good[0].parent)


@pytest.mark.parametrize("make", ["pickle", "torch", "torch-legacy"])
def test_a_pickle_is_never_opened(
    make: str, good: tuple[Path, Path], tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_TEST_BOMB", str(tmp_path / "exploded"))
    data = pickle.dumps(_Bomb())
    pickle.loads(data)
    assert (tmp_path / "exploded").exists(), "the bomb is a dud"
    (tmp_path / "exploded").unlink()
    if make == "pickle":
        good[1].write_bytes(data)
    else:
        torch.save({"weight": _Bomb()}, good[1], _use_new_zipfile_serialization=make == "torch")
    refused(tiny_llama(), good[0].parent, "damaged safetensors file")
    (good[1].parent / "adapter_model.bin").write_bytes(good[1].read_bytes())
    good[1].unlink()
    refused(tiny_llama(), good[0].parent)
    assert not (tmp_path / "exploded").exists()


def test_links_as_a_hub_cache_has_them(good: tuple[Path, Path], tiny_llama: Make, tmp_path: Path) -> None:
    """Reading follows a link; saving replaces the link, and leaves alone what it pointed to."""
    (tmp_path / "blobs").mkdir()
    for path in good:
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    model = tiny_llama()
    trimtab.load_adapter(model, good[0].parent)
    trimtab.detach(model)
    trimtab.save_adapter(trained(model, Rule(match="*.k_proj", method="lora", rank=1)), good[0].parent)
    assert {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()} == kept
    assert not any(path.is_symlink() for path in good[0].parent.iterdir())


# Tensors that do not belong -----------------------------------------------------------------------------------------


def some(tensors: Path, part: str) -> str:
    return next(name for name in sorted(load_file(tensors)) if part in name and "q_proj" in name)


def replace(part: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Mutation:
    def spoil(config: Path, tensors: Path) -> None:
        name = some(tensors, part)
        edit_tensors(tensors, {name: change(load_file(tensors)[name])})

    return spoil


def rename(to: Callable[[str], str]) -> Mutation:
    return lambda config, tensors: edit_tensors(tensors, rename={some(tensors, "A"): to(some(tensors, "A"))})


TENSORS: dict[str, Mutation] = {
    "A is gone": replace("A", lambda tensor: None),
    "the magnitude is gone": replace("magnitude", lambda tensor: None),
    "A is transposed": replace("A", lambda tensor: tensor.t().contiguous()),
    "A is flat": replace("A", lambda tensor: tensor.flatten()),
    "A has one more axis": replace("A", lambda tensor: tensor.unsqueeze(-1)),
    "A is empty": replace("A", lambda tensor: tensor[:0]),
    "A is longer": replace("A", lambda tensor: torch.cat([tensor, tensor])),
    "the magnitude is longer": replace("magnitude", lambda tensor: torch.cat([tensor, tensor])),
    "the magnitude is one number": replace("magnitude", lambda tensor: tensor[:1]),
    "integers": replace("A", lambda tensor: tensor.to(torch.int64)),
    "bytes": replace("A", lambda tensor: tensor.to(torch.uint8)),
    "booleans": replace("A", lambda tensor: tensor > 0),
    "complex numbers": replace("A", lambda tensor: tensor.to(torch.complex64)),
    "eight bits": replace("A", lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "one more tensor": lambda config, tensors: edit_tensors(tensors, {"extra": torch.zeros(3)}),
    "one more tensor of a module": lambda config, tensors: edit_tensors(
        tensors, {some(tensors, "A").replace("q_proj", "k_proj"): torch.zeros(2, 16)}
    ),
    "no tensors": lambda config, tensors: edit_tensors(tensors, dict.fromkeys(load_file(tensors))),
    "a name that climbs": rename(lambda name: f"../../{name}"),
    "a name that is a path": rename(lambda name: f"/etc/{name}"),
    "a name with dots alone": rename(lambda name: "...."),
    "an empty name": rename(lambda name: ""),
    "a deep name": rename(lambda name: "a." * 100_000 + name),
    "a long name": rename(lambda name: "a" * 500 + name),
    "a name that steers the terminal": rename(lambda name: f"\x1b[2J\x1b]0;gone\x07{name}"),
    "a name with a line end": rename(lambda name: name.replace("q_proj", "q_proj\n")),
    "a name of an attribute": rename(lambda name: name.replace("q_proj", "__class__")),
}


@pytest.mark.parametrize("mutation", TENSORS)
def test_tensors_that_do_not_belong(mutation: str, good: tuple[Path, Path], tiny_llama: Make) -> None:
    TENSORS[mutation](*good)
    refused(tiny_llama(), good[0].parent)


@pytest.mark.parametrize("mutation", TENSORS)
def test_the_same_without_the_checks_of_belonging(mutation: str, good: tuple[Path, Path], tiny_llama: Make) -> None:
    """An attacker makes the header fit, or leaves it out; then the tensors themselves are all there is to check."""
    TENSORS[mutation](*good)
    if good[0].name == PEFT_FILES[0]:
        edit_tensors(good[1], header={"format": "pt"})
    else:
        forge(good[0].parent, lambda modules: None)
    if mutation == "one more tensor of a module" and good[0].name == PEFT_FILES[0]:
        edit_tensors(good[1], {some(good[1], "B").replace("q_proj", "k_proj"): torch.zeros(16, 2)})  # k_proj has 8
    refused(tiny_llama(), good[0].parent)


@pytest.mark.parametrize("length", [513, 10_000_000])
def test_names_without_end_are_not_looked_at(length: int, good: tuple[Path, Path], tiny_llama: Make) -> None:
    edit_tensors(good[1], {"a" * length: torch.zeros(1)})
    refused(tiny_llama(), good[0].parent, rf"name is {length} characters long: a{{120}}\.\.\.$")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_do_not_reach_the_base(value: float, good: tuple[Path, Path], tiny_llama: Make) -> None:
    """They can be loaded, to be looked at; merging them is refused, and taking them off gives the base back."""
    tensor = load_file(good[1])[some(good[1], "A")]
    tensor[1, 3] = value
    edit_tensors(good[1], {some(good[1], "A"): tensor})
    model = tiny_llama()
    bare = state_of(model)
    trimtab.load_adapter(model, good[0].parent)
    loaded = state_of(model)
    with pytest.raises(SurgeryError, match="holds NaN or infinity"):
        trimtab.merge(model)
    assert loaded["identities"] == state_of(model)["identities"]
    assert loaded["modules"] == state_of(model)["modules"]
    trimtab.detach(model)
    assert_unchanged(model, bare)
