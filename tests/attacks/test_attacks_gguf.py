"""GGUF files whose head counts without end, or is cut anywhere: a ModelError, soon, without the memory asked for."""

from __future__ import annotations

import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sampling import sample
from tiny_gguf import write_gguf
from trimtab.errors import ModelError
from trimtab.models.gguf import gguf_config
from trimtab.models.load import load_model
from trimtab.models.locate import locate
from trimtab.reading import MIB, within

# Time that is over may be told first to a callback of the garbage collector, which drops it; it is told again.
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    write_gguf(file := tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    return file.read_bytes()


def refused(data: bytes, folder: Path) -> None:
    (file := folder / "bad.gguf").write_bytes(data)
    start = time.monotonic()
    with suppress(ModelError), within("it", seconds=60, memory=2048 * MIB):
        gguf_config(file)  # which may be whole
    with pytest.raises(ModelError, match=r"bad\.gguf") as caught, within("it", seconds=60, memory=2048 * MIB):
        load_model(locate(str(file)))
    assert len(str(caught.value)) < 1500
    assert "\x1b" not in str(caught.value)
    assert time.monotonic() - start < 30


def put(data: bytes, at: int, form: str, value: int) -> bytes:
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


COUNTS = [2**31, 2**40, 2**62, 2**64 - 1]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("what", ["tensors", "settings"])
def test_counts_without_end(what: str, count: int, good: bytes, tmp_path: Path) -> None:
    refused(put(good, 8 if what == "tensors" else 16, "<Q", count), tmp_path)


@pytest.mark.parametrize("length", COUNTS)
@pytest.mark.parametrize("name", [b"general.architecture", b"tokenizer.ggml.pre"])
def test_texts_without_end(name: bytes, length: int, good: bytes, tmp_path: Path) -> None:
    """The length of a name, and that of the text behind it."""
    at = good.index(name)
    refused(put(good, at - 8, "<Q", length), tmp_path)
    refused(put(good, at + len(name) + 4, "<Q", length), tmp_path)


@pytest.mark.parametrize("length", COUNTS)
def test_lists_without_end(length: int, good: bytes, tmp_path: Path) -> None:
    name = b"tokenizer.ggml.tokens"
    refused(put(good, good.index(name) + len(name) + 8, "<Q", length), tmp_path)


@pytest.mark.parametrize("size", [0, 2**32, 2**62, 2**64 - 1])
def test_tensors_without_end(size: int, good: bytes, tmp_path: Path) -> None:
    name = b"token_embd.weight"
    refused(put(good, good.index(name) + len(name) + 4, "<Q", size), tmp_path)


@pytest.mark.parametrize("version", [0, 1, 4, 2**31])
def test_other_versions(version: int, good: bytes, tmp_path: Path) -> None:
    refused(put(good, 4, "<I", version), tmp_path)


@pytest.mark.parametrize("kind", [13, 255, 2**31])
def test_settings_of_no_kind(kind: int, good: bytes, tmp_path: Path) -> None:
    name = b"llama.block_count"
    refused(put(good, good.index(name) + len(name), "<I", kind), tmp_path)


@pytest.mark.parametrize("blocks", [2**20, 2**31 - 1])
def test_blocks_without_end(blocks: int, good: bytes, tmp_path: Path) -> None:
    name = b"llama.block_count"
    refused(put(good, good.index(name) + len(name) + 4, "<I", blocks), tmp_path)


@pytest.mark.parametrize("share", sample([number / 20 for number in range(19)], every=4))
def test_cut_anywhere(share: float, good: bytes, tmp_path: Path) -> None:
    refused(b"GGUF" + good[4 : int(len(good) * share)], tmp_path)


def test_escapes_in_fields(good: bytes, tmp_path: Path) -> None:
    refused(good.replace(b"llama", b"\x1b[2J\x07"), tmp_path)
