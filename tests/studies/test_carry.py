"""What a run reads and writes, on its way to another machine and home."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny_runs import rows, write_rows
from trimtab.config.read import load_config, with_paths
from trimtab.data.sources import local_files
from trimtab.errors import RunError
from trimtab.models import known_again
from trimtab.models.known_again import mark
from trimtab.studies import carry
from trimtab.studies.carry import below, carried, files_of, header_of, lay_out, packed, unpacked, with_header


def test_all_that_a_run_reads_is_found(make_config: Callable[..., Any], model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in ("a", "b"):
        write_rows(tmp_path / "parts" / f"{name}.jsonl", rows(3))
    write_rows(tmp_path / "test.jsonl", rows(3))
    data = {"test": {"some": "parts/*.jsonl", "few": "test.jsonl[:2]", "hub": "owner/name:test"}, "validation": 0.5}
    config = make_config(data=data)
    found = {Path(file.path).relative_to(tmp_path) for file in files_of(config) if "parts" in file.path}
    assert found == {Path("parts/a.jsonl"), Path("parts/b.jsonl")}
    names = {Path(file.path).name for file in files_of(config)}
    assert {"completion.jsonl", "test.jsonl", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {file.path for file in files_of(config) if file.path.startswith(str(model_folder))}


def test_pictures_are_found_by_the_rows_that_name_them(make_config: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("one", "two", "unnamed"):
        Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / f"{name}.png")
    labelled = [{"image": f"pictures/{name}.png", "label": "a"} for name in ("one", "two")]
    write_rows(tmp_path / "labelled.jsonl", labelled)
    config = make_config(data={"test": {"pictures": "labelled.jsonl"}})
    assert {Path(file.path).name for file in files_of(config) if file.path.endswith(".png")} == {"one.png", "two.png"}


def test_what_a_source_reads(tmp_path: Path) -> None:
    write_rows(tmp_path / "a[:1].jsonl", rows(1))
    (tmp_path / "saved").mkdir()
    assert local_files("a[:1].jsonl", tmp_path) == [tmp_path / "a[:1].jsonl"]
    assert local_files("saved:train", tmp_path) == [tmp_path / "saved"]
    assert local_files("missing.jsonl", tmp_path) == local_files("owner/name", tmp_path) == []


def test_a_file_is_known_again_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_again, "WHOLE", 2**17)
    file = tmp_path / "weights"
    file.write_bytes(bytes(2**20))
    known = carry.Carried(str(file), 2**20, mark(file))
    assert known.is_here
    content = bytearray(2**20)
    content[2**19 : 2**19 + 2**16] = b"1" * 2**16  # in the middle of a file of which parts alone are read
    file.write_bytes(content)
    assert not known.is_here
    assert not carry.Carried(str(tmp_path / "gone"), 2**20, known.mark).is_here


def test_over_there_every_path_keeps_its_name(tmp_path: Path, make_config: Callable[..., Any]) -> None:
    config = make_config(data={"test": {"few": "completion.jsonl[:2]"}})
    root = tmp_path / "root"
    moved = with_paths(config, lambda path: str(below(root, path)))
    assert moved.data.test["few"][0].path == f"{root}{config.data.test['few'][0].path}"
    assert moved.model.name == f"{root}{config.model.name}"
    assert moved.output == config.output


def test_a_file_is_linked_where_it_is_reached_and_else_fetched(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("abc")
    file = carry.Carried(str(tmp_path / "rows"), 3, mark(tmp_path / "rows"))
    lay_out(tmp_path / "one", [file], lambda path: [], links=True)
    assert below(tmp_path / "one", file.path).is_symlink()
    lay_out(tmp_path / "two", [file], lambda path: [b"a", b"bc"], links=False)
    assert below(tmp_path / "two", file.path).read_text() == "abc"
    with pytest.raises(RunError, match=r"rows: 0\.00 GiB, which the machine .* has not.* share"):
        lay_out(tmp_path / "three", [file], lambda path: [], links=False)


def test_the_largest_files_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "CARRIED", 10)
    files = [carry.Carried(name, size, "") for name, size in (("large", 9), ("small", 2), ("middle", 3))]
    assert carried(files) == {"small", "middle"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "home" / "run"
    for name in ("checkpoints/checkpoint-1/x", "adapter/adapter_model.safetensors", "evaluation/a.json", ".lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x00\xff")
    (folder / "summary.json").write_text(json.dumps({"output": f"{tmp_path}/root/home/run"}))
    (folder / "adapter_model.safetensors").symlink_to("adapter/adapter_model.safetensors")
    return folder


def names_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_a_run_comes_home_without_checkpoints_and_with_paths_of_home(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "cell" / "run"
    (home / "checkpoints").mkdir(parents=True)  # what was cut off here is replaced
    unpacked(packed(run, tmp_path / "root", adapter=True), home)
    assert names_in(home) == {"adapter/adapter_model.safetensors", "evaluation/a.json", "summary.json"}
    assert json.loads((home / "summary.json").read_text()) == {"output": "/home/run"}
    assert not (home / "checkpoints").exists()
    unpacked(packed(run, tmp_path / "root", adapter=False), home)
    assert names_in(home) == {"evaluation/a.json", "summary.json"}


def test_a_run_that_is_too_large_stays(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "BROUGHT", 3)
    with pytest.raises(RunError, match="keep results"):
        packed(run, tmp_path / "root", adapter=True)


@pytest.mark.parametrize(
    ("files", "content", "said"),
    [
        ([["../cell.json", 2]], b"{}", "none of a run's"),
        ([["/etc/passwd", 2]], b"{}", "none of a run's"),
        ([["a/../../b", 2]], b"{}", "none of a run's"),
        ([["c:\\b", 2]], b"{}", "none of a run's"),
        ([["", 2]], b"{}", "none of a run's"),
        ([["a/./b", 2]], b"{}", "none of a run's"),
        ([["checkpoints/x", 2]], b"{}", "none of a run's"),
        ([["a", 2.0]], b"{}", "none of a run's"),
        ([["a", True]], b"{", "none of a run's"),
        ([["a"]], b"{}", "none of a run's"),
        ("a", b"{}", "none of a run's"),
        ([["a", 3]], b"{}", "other sizes"),
        ([["a", 4], ["b", -2]], b"{}", "other sizes"),
        ([["a", 1], ["a", 1]], b"{}", "twice"),
    ],
)
def test_what_comes_home_is_looked_at_before_it_is_written(
    files: Any, content: bytes, said: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=said):
        unpacked(with_header({"files": files}, content), tmp_path / "cell" / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parcel", [b"", b"\x80\x05cposix\nsystem\n.", with_header([])[:9], b"\xff" * 40])
def test_anything_else_is_no_parcel(parcel: bytes) -> None:
    with pytest.raises(RunError, match="no parcel"):
        header_of(parcel)


def test_a_file_that_cannot_be_read_is_named(make_config: Callable[..., Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", rows(3))
    config = make_config(data={"test": {"one": "test.jsonl"}})
    (tmp_path / "test.jsonl").write_text("no json")
    with pytest.raises(RunError, match=r"cannot be carried \(.*test\.jsonl"):
        files_of(config)


def test_a_wheels_model_is_told_by_its_weights(make_yaml: Callable[..., Path]) -> None:
    pytest.importorskip("gguf")
    config = load_config(make_yaml(), ["model.name=owner/name"])
    assert carry.model_words(config) == "owner/name from the hub"
