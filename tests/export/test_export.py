"""The formats of ``export/``: each keeps its contract, and ``merged`` is a folder that transformers loads by itself."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_runs import tiny_model, tiny_tokenizer
from trimtab import export
from trimtab.errors import ModelError
from trimtab.export._hand_over import write_whole
from trimtab.export.merged import save
from trimtab.models.load import load_model
from trimtab.models.locate import Source, locate

MERGED = export.export_format("merged")


def write(
    model: Any, tokenizer: Any, out: Path, *, overwrite: bool = False, base: Source | None = None, chat: bool = False
) -> list[str]:
    """A model without adapters as the format ``merged`` writes it."""
    told: list[str] = []
    target = MERGED.check_target(out, overwrite=overwrite)

    def fill(folder: Path) -> None:
        told.extend(save(model, tokenizer, folder, base=base, chat=chat))

    write_whole(target, fill, lambda: 1000, overwrite=overwrite)
    return told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder as transformers itself writes it."""
    path = tmp_path / "tiny"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_an_unknown_format_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"unknown export format 'mergd': expected one of .*merged.* Did you mean"):
        export.export_format("mergd")


def test_a_written_folder_loads_without_trimtab(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model.generation_config.max_new_tokens = 7
    write(model, tokenizer, tmp_path / "a" / "out")
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
    write(tiny_model(), tiny_tokenizer(), tmp_path / "out")
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {expected}


def test_an_empty_folder_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tiny_model(), tiny_tokenizer(), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_folder_that_holds_something_is_refused(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="not empty"):
        write(tiny_model(), tiny_tokenizer(), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_model_folder_is_replaced_as_a_whole_if_allowed(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_text("of the old model")
    write(tiny_model(hidden_size=48), tiny_tokenizer(), folder, overwrite=True)
    assert load_model(locate(str(folder))).config.hidden_size == 48
    assert not (folder / "model-00001-of-00002.safetensors").exists()


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match="something other than a model"):
        write(tiny_model(), tiny_tokenizer(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").is_file()


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ModelError, match="found a file"):
        write(tiny_model(), tiny_tokenizer(), tmp_path / "out")


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def fail(path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(ModelError, match=r"the disk is full .*free some of it"):
        write(model, tokenizer, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# Ends of an answer


def _generation(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    return found


def test_every_token_that_ends_an_answer_is_written_down(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [5, 0]
    write(model, tokenizer, tmp_path / "out")
    assert _generation(tmp_path / "out")["eos_token_id"] == [0, 3, 5]  # the texts' end, the template's, one of its own
    assert not _generation(tmp_path / "out").get("_from_model_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|eos|>"
    assert model.generation_config.eos_token_id == [5, 0]

    write(tiny_model(), tiny_tokenizer(None), tmp_path / "plain")
    assert _generation(tmp_path / "plain")["eos_token_id"] == 0


def test_after_training_on_conversations_texts_end_as_turns_do(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    write(model, tokenizer, tmp_path / "out", chat=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.config.eos_token_id, again.generation_config.eos_token_id) == (3, [0, 3])
    assert (tokenizer.eos_token, model.config.eos_token_id) == ("<|eos|>", 0)


def test_a_base_that_sets_a_temperature_without_sampling_is_written_all_the_same(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.update(temperature=0.6, top_p=0.9)
    write(model, tiny_tokenizer(), tmp_path / "out")
    said = _generation(tmp_path / "out")
    assert (said["temperature"], said["top_p"], said["do_sample"]) == (0.6, 0.9, True)


# What a base has besides weights


def _base(folder: Path, **options: Any) -> Source:
    return replace(locate(str(folder)), **options)


def test_files_of_the_base_besides_weights_are_carried_along(folder: Path, tmp_path: Path) -> None:
    kept = {"tokenizer.model": b"pieces", "vocab.json": b"{}", "LICENSE": b"free", "preprocessor_config.json": b"{}"}
    left = ("pytorch_model.bin", "model.safetensors.index.json", "README.md", ".gitattributes", "quantize_config.json")
    for name, content in {**kept, **dict.fromkeys(left, b"of the base"), "adapter_config.json": b"{}"}.items():
        (folder / name).write_bytes(content)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|eos|>", "own": "kept"}')
    (folder / "added_tokens.json").write_text("{}")
    out, tokenizer = tmp_path / "out", tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    told = write(tiny_model(), tokenizer, out, base=_base(folder), chat=True)

    assert told == []
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert not any((out / name).exists() for name in (*left, "adapter_config.json"))
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "{{ documents }}"
    marks = json.loads((out / "special_tokens_map.json").read_text())
    assert (marks["eos_token"], marks["own"]) == ("<|im_end|>", "kept")
    assert json.loads((out / "added_tokens.json").read_text())["<tool>"] == len(tokenizer) - 1


def test_code_of_the_base_is_carried_only_if_it_was_trusted(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_own.py").write_text("1 / 0")
    told = write(tiny_model(), tiny_tokenizer(), tmp_path / "a", base=_base(folder))
    assert told == ["code of the base is not carried along: modeling_own.py"]
    assert not (tmp_path / "a" / "modeling_own.py").exists()
    told = write(tiny_model(), tiny_tokenizer(), tmp_path / "b", base=_base(folder, trust_remote_code=True))
    assert "trust_remote_code is on: modeling_own.py" in told[0]
    assert (tmp_path / "b" / "modeling_own.py").is_file()


def test_a_template_of_the_run_s_own_replaces_all_of_the_base_s(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    write(tiny_model(), tiny_tokenizer(template), tmp_path / "out", base=_base(folder, chat_template=template))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    assert not (tmp_path / "out" / "chat_template.json").exists()


def test_a_base_on_the_hub_that_is_out_of_reach_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = Source("own/model", "hub", "own/model")
    told = write(tiny_model(), tiny_tokenizer(), tmp_path / "out", base=base)
    assert "own/model: its files besides weights and tokenizer cannot be reached" in told[0]


def test_of_a_gguf_file_what_can_be_written_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.export._carried.side_files", lambda base: folder)
    tokenizer = tiny_tokenizer()
    write(tiny_model(), tokenizer, tmp_path / "out", base=Source("m.gguf", "gguf", str(tmp_path / "m.gguf")))
    assert json.loads((tmp_path / "out" / "vocab.json").read_text())["<|im_end|>"] == 3
    assert (tmp_path / "out" / "merges.txt").is_file()
