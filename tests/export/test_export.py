"""The formats of ``export/``: each keeps its contract, and ``merged`` is a folder that transformers loads by itself."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_runs import tiny_model, tiny_tokenizer
from trimtab import export
from trimtab.errors import ModelError
from trimtab.models.load import load_model
from trimtab.models.locate import locate

MERGED = export.export_format("merged")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder as transformers itself writes it."""
    path = tmp_path / "tiny"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", export.names())
def test_every_format_writes_whole_and_replaces_only_when_told_to(name: str, tmp_path: Path) -> None:
    form = export.export_format(name)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    out = tmp_path / "new" / "out"
    assert form.check_target(out) == out
    form.write(model, tokenizer, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing temporary stays
    with pytest.raises(ModelError, match="--overwrite"):
        form.check_target(out)
    with pytest.raises(ModelError, match="--overwrite"):
        form.write(model, tokenizer, out)
    form.write(model, tokenizer, out, overwrite=True)
    assert form.summary


def test_an_unknown_format_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"unknown export format 'mergd': expected one of .*merged.* Did you mean"):
        export.export_format("mergd")


def test_a_written_folder_loads_without_trimtab(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model.generation_config.max_new_tokens = 7
    MERGED.write(model, tokenizer, tmp_path / "a" / "out")
    out = tmp_path / "a" / "out"

    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.generation_config.max_new_tokens == 7
    for (name, expected), (other, actual) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(expected, actual), name
    read = AutoTokenizer.from_pretrained(out)
    assert read("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    assert read.chat_template == tokenizer.chat_template
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]  # nothing temporary stays


def test_written_files_are_as_readable_as_others(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    MERGED.write(tiny_model(), tiny_tokenizer(), tmp_path / "out")
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {expected}


def test_an_empty_folder_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    MERGED.write(tiny_model(), tiny_tokenizer(), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_folder_that_holds_something_is_refused(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="not empty"):
        MERGED.write(tiny_model(), tiny_tokenizer(), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_model_folder_is_replaced_as_a_whole_if_allowed(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_text("of the old model")
    MERGED.write(tiny_model(hidden_size=48), tiny_tokenizer(), folder, overwrite=True)
    assert load_model(locate(str(folder))).config.hidden_size == 48
    assert not (folder / "model-00001-of-00002.safetensors").exists()


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match="something other than a model"):
        MERGED.write(tiny_model(), tiny_tokenizer(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").is_file()


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ModelError, match="found a file"):
        MERGED.write(tiny_model(), tiny_tokenizer(), tmp_path / "out")


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def fail(path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(ModelError, match=r"the disk is full .*free some of it"):
        MERGED.write(model, tokenizer, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
