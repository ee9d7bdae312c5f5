"""GGUF files: what is read from them, and the cache that it goes into."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tiny_gguf import HIDDEN, INTERMEDIATE, KEY_HEADS, TEMPLATE, write_gguf
from trimtab.errors import ModelError, TrimtabWarning
from trimtab.models.gguf import _as_sentencepiece, cache_folder, dequantised_folder, gguf_config
from trimtab.models.load import load_model
from trimtab.models.locate import locate
from trimtab.models.model_files import load_config_only, load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_the_dequantised_values_are_exact(tmp_path: Path) -> None:
    reference = write_gguf(tmp_path / "tiny.gguf")
    model = load_model(locate("tiny.gguf", tmp_path))
    expected = reference.state_dict()
    assert set(model.state_dict()) == set(expected)
    for name, actual in model.state_dict().items():
        assert torch.equal(actual, expected[name]), name
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    # One graph on the same numbers; only the value of rms_norm_eps went through the file's float32.
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-6)


def test_the_cached_folder_is_an_ordinary_one(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = dequantised_folder(tmp_path / "tiny.gguf")
    assert folder.parent == cache == cache_folder()
    assert folder.name.startswith("tiny-")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert all(type(module) is torch.nn.Linear for name, module in plain.named_modules() if name.endswith("_proj"))


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = load_tokenizer(locate("tiny.gguf", tmp_path))
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.eos_token, tokenizer.padding_side) == ("<|im_end|>", "right")
    assert tokenizer.pad_token == "<|im_end|>"  # the file names none
    ids = tokenizer("<|im_start|>ab é<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "<|im_start|>ab é<|im_end|>"
    assert tokenizer.decode([ids[1]]) == "ab"


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["  ", "1", "2"]), ("gpt-2", [" ", " ", "1", "2"])])
def test_digits_are_split_off_first_where_the_vocabulary_was_learned_so(
    tmp_path: Path, pre: str, expected: list[str]
) -> None:
    # GPT-2's pattern keeps the last of several spaces for the number that follows; with digits split off first, the
    # spaces stay together. Both as llama.cpp does it for these two kinds of vocabulary.
    write_gguf(tmp_path / "tiny.gguf", pre)
    tokenizer = load_tokenizer(locate("tiny.gguf", tmp_path))
    assert [tokenizer.decode([i]) for i in tokenizer("  12")["input_ids"]] == expected


@pytest.mark.parametrize("pre", ["qwen2", "stablelm2", "hunyuan"])
def test_some_split_numbers_and_words_as_qwen_does(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre)
    splitting = load_tokenizer(locate("tiny.gguf", tmp_path)).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in splitting.pre_tokenize_str("a 12 I'LL\n")] == ["a", "Ġ", "1", "2", "ĠI", "'LL", "Ċ"]


def test_a_way_to_split_text_that_is_not_known_is_told(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre="deepseek-llm")
    with pytest.warns(TrimtabWarning, match="how its vocabulary splits text .'deepseek-llm'. is not known"):
        load_tokenizer(locate("tiny.gguf", tmp_path))


def test_the_tokenizer_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    said = json.loads((dequantised_folder(tmp_path / "tiny.gguf") / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("prefix", "text", "pieces"),
    [
        (True, "the", ["\u2581", "t", "h", "e"]),
        (True, " the", ["\u2581", "\u2581", "t", "h", "e"]),
        (True, "<s>the", ["<s>", "\u2581", "t", "h", "e"]),
        (False, "the", ["t", "h", "e"]),
        (False, " the", ["\u2581", "t", "h", "e"]),
    ],
)
def test_spaces_of_sentencepiece_stand_where_llama_cpp_has_them(prefix: bool, text: str, pieces: list[str]) -> None:
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "\u2581", "t", "h", "e"])}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    backend.add_special_tokens(["<s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # as transformers has it
    _as_sentencepiece(backend, prefix=prefix)
    encoded = backend.encode(text)
    assert encoded.tokens == pieces
    assert backend.decode(encoded.ids) == text.removeprefix("<s>")


def test_the_configuration_alone_writes_nothing(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    before = load_config_only(locate("tiny.gguf", tmp_path))
    assert not cache.exists()
    assert (before.hidden_size, before.num_key_value_heads) == (HIDDEN, KEY_HEADS)
    dequantised_folder(tmp_path / "tiny.gguf")
    after = gguf_config(tmp_path / "tiny.gguf")  # from the cache now
    assert after.intermediate_size == before.intermediate_size == INTERMEDIATE


def test_a_file_is_dequantised_once_and_again_when_it_changed(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trimtab")
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    first = dequantised_folder(file)
    weights = first / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert dequantised_folder(file) == first
    assert weights.stat().st_mtime_ns == written
    assert caplog.text.count("Dequantising tiny.gguf, once") == 1

    os.utime(file, ns=(1, 1))
    assert dequantised_folder(file) != first
    assert {path.name[:5] for path in cache.iterdir()} == {"tiny-"}  # and nothing temporary


def test_a_cached_folder_that_lost_files_is_made_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = dequantised_folder(tmp_path / "tiny.gguf")
    (folder / "model.safetensors").unlink()
    assert dequantised_folder(tmp_path / "tiny.gguf") == folder
    assert (folder / "model.safetensors").is_file()


def test_who_comes_second_uses_what_the_first_wrote(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes found no cache and both dequantise; here the other one finishes while this one is writing."""
    write_gguf(tmp_path / "tiny.gguf")
    made = dequantised_folder(tmp_path / "tiny.gguf")
    aside = tmp_path / "aside"
    made.rename(aside)
    original = LlamaForCausalLM.save_pretrained

    def save(self: LlamaForCausalLM, folder: Path) -> None:
        original(self, folder)
        shutil.copytree(aside, made)
        (made / "first").write_text("")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    assert dequantised_folder(tmp_path / "tiny.gguf") == made
    assert (made / "first").exists()
    assert list(cache.iterdir()) == [made]


@pytest.mark.full
def test_two_processes_at_once(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    code = "import sys, pathlib, trimtab.models.gguf as g; print(g.dequantised_folder(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "tiny.gguf")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].splitlines()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert {str(path) for path in cache.iterdir()} == folders
    AutoModelForCausalLM.from_pretrained(folders.pop())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRIMTAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "trimtab" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "trimtab" / "models"


@pytest.mark.parametrize("keep", [4, 64, 5000, -1000])
def test_a_damaged_file(tmp_path: Path, cache: Path, keep: int) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"tiny\.gguf: cannot be read as a GGUF model"):
        load_model(locate("tiny.gguf", tmp_path))
    assert not cache.exists()


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "0.0001")
    with pytest.raises(ModelError, match=r"Dequantising tiny\.gguf needs about .* GiB of memory are free"):
        dequantised_folder(tmp_path / "tiny.gguf")


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"of disk in .*Set TRIMTAB_CACHE"):
        dequantised_folder(tmp_path / "tiny.gguf")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written .*Set TRIMTAB_CACHE"):
        dequantised_folder(tmp_path / "tiny.gguf")


@pytest.mark.full
def test_the_real_model_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_CACHE")  # the real cache: filled once, for all tests
    source = locate("smollm2-135m")
    model: Any = load_model(source)
    tokenizer: Any = load_tokenizer(source)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert text.startswith("The capital of France is Paris")

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # As the published tokenizer has it: every digit apart, and what is before it split off first.
    assert tokenizer.convert_ids_to_tokens(tokenizer("in  2018")["input_ids"]) == ["in", "ĠĠ", "2", "0", "1", "8"]

    # Against the reference implementation of the blocks, for tensors whose rows are not reordered.
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source.location).tensors}
    for name, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
    }.items():
        expected = torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        assert torch.equal(model.state_dict()[ours], expected), name
