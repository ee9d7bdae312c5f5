"""The formats for llama.cpp: types, rows, tokens, the Modelfile, and what is refused. No llama.cpp is needed here."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from tiny_gguf import write_gguf
from tiny_runs import CHATML, tiny_model, tiny_tokenizer
from trimtab.errors import ModelError, SurgeryError
from trimtab.export import Wishes, export_format, hand_over
from trimtab.export._gguf_file import GgufFile, Order, kind_for, orders, write_copy
from trimtab.export._gguf_tokens import _grown
from trimtab.export._modelfile import modelfile, pieces_of
from trimtab.export._subject import Subject

LORA = [{"match": "all-linear", "method": "lora", "rank": 4, "alpha": 8}]
SMALL = {"train": {"max_steps": 3, "learning_rate": 1e-5}}
TURNED = LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)


def handed(form: str, run: Path, out: Path, **wishes: Any) -> Any:
    return hand_over(export_format(form), run, out, Wishes(**wishes))


@pytest.mark.parametrize("order", orders(TURNED), ids=str)
def test_an_order_is_undone_by_its_inverse(order: Order) -> None:
    ours = np.random.default_rng(0).normal(size=(72, 1) if order.kind == "squeezed" else (72, 8)).astype("float32")
    there = order.there(ours)
    np.testing.assert_allclose(order.back(there), ours, atol=1e-6)
    assert order in (Order(), Order("fused", 1, 6)) or there.shape != ours.shape or not np.array_equal(there, ours)


def test_fused_rows_become_queries_then_keys_then_values() -> None:
    # Two key heads with two query heads each, of one row: as transformers' Falcon has them, head by head.
    ours = np.array([[name] for name in (11, 12, 21, 31, 13, 14, 22, 32)])
    assert Order("fused", 2, 2).there(ours)[:, 0].tolist() == [11, 12, 13, 14, 21, 22, 31, 32]


def test_in_the_type_of_each_tensor_a_small_update_is_rounded_away_and_told(trained: Any, tmp_path: Path) -> None:
    run = trained("small", LORA, on_gguf=True, **SMALL)
    told = handed("gguf", run, tmp_path / "own").notes
    assert any("of what was trained: it is smaller than their steps" in one for one in told)
    assert GgufFile(tmp_path / "own" / "model.gguf").tensors["blk.0.attn_q.weight"].tensor_type.name == "Q4_1"
    assert not any("what was trained" in one for one in handed("gguf", run, tmp_path / "f16", type="f16").notes)


def test_what_was_not_trained_stays_byte_for_byte(trained: Any, tmp_path: Path) -> None:
    run = trained("one", [{"match": "*.0.*.q_proj", "method": "mora", "rank": 4}], on_gguf=True)
    handed("gguf", run, tmp_path / "out")
    before = GgufFile(Path(Subject.load(run, Wishes()).source.location))
    after = GgufFile(tmp_path / "out" / "model.gguf")
    same = [name for name, one in before.tensors.items() if np.array_equal(one.data, after.tensors[name].data)]
    assert set(before.tensors) - set(same) == {"blk.0.attn_q.weight"}
    fields = {name: field.contents() for name, field in before.reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        name: field.contents() for name, field in after.reader.fields.items() if not name.startswith("GGUF.")
    }


def test_a_head_of_its_own_becomes_a_tensor_of_its_own(trained: Any, tmp_path: Path) -> None:
    run = trained("embed", [{"match": "*.embed_tokens", "method": "lora", "rank": 4}], on_gguf=True)
    said = handed("gguf", run, tmp_path / "out", type="f32")
    file = GgufFile(tmp_path / "out" / "model.gguf")
    assert not np.array_equal(file.values("token_embd.weight"), file.values("output.weight"))
    assert said.agreement.kl < 1e-6
    with pytest.raises(SurgeryError, match="embedding, or on an output head"):
        handed("gguf-lora", run, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_new_tokens_stand_in_the_file(trained: Any, tmp_path: Path) -> None:
    model = {"add_tokens": ["<tool>", "<end>"]}
    run = trained("tokens", LORA, on_gguf=True, model=model)
    said = handed("gguf", run, tmp_path / "out", type="f32")
    file = GgufFile(tmp_path / "out" / "model.gguf")
    tokens = file.field("tokenizer.ggml.tokens")
    assert tokens[-2:] == ["<tool>", "<end>"]
    assert len(tokens) == len(file.field("tokenizer.ggml.token_type")) == file.values("token_embd.weight").shape[0]
    assert file.field("llama.vocab_size") == len(tokens)
    assert said.agreement.kl < 1e-6


def test_new_tokens_take_the_names_of_rows_that_the_file_has_to_spare() -> None:
    tokenizer = tiny_tokenizer()
    count = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    tokens = [*tokenizer.convert_ids_to_tokens(range(count)), f"[PAD{count}]", f"[PAD{count + 1}]"]
    held = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}
    file: Any = SimpleNamespace(path=Path("m.gguf"), architecture="llama", field=held.get)
    assert _grown(file, tokenizer, count + 2, []) == {}
    found = _grown(file, tokenizer, count + 2, ["<tool>"])
    assert found == {
        "tokenizer.ggml.tokens": [*tokens[:count], "<tool>", tokens[-1]],
        "tokenizer.ggml.token_type": [*[1] * count, 4, 1],
    }


def test_types_that_gguf_cannot_write_become_the_nearest_finer_one() -> None:
    kinds = gguf.GGMLQuantizationType
    assert kind_for(kinds.Q4_K, None, (64, 256)) is kinds.Q8_0
    assert kind_for(kinds.Q6_K, kinds.Q4_0, (64, 256)) is kinds.Q4_0
    assert kind_for(kinds.Q4_1, None, (64, 256)) is kinds.Q4_1
    assert kind_for(kinds.F32, kinds.Q8_0, (64,)) is kinds.F32  # vectors stay
    assert kind_for(kinds.F16, kinds.Q8_0, (64, 40)) is kinds.F16  # rows that no block of 32 divides


# A base that did not come from a GGUF file


def _folder_of_gguf(root: Path) -> tuple[Path, Path]:
    """A model folder and the GGUF file of the same model, in Q4_1."""
    from trimtab.models.gguf import dequantised_folder

    write_gguf(root / "same.gguf")
    shutil.copytree(dequantised_folder(root / "same.gguf"), root / "folder")
    return root / "folder", root / "same.gguf"


def _trained_on(folder: Path, root: Path, plan: Any) -> Path:
    from tiny_runs import rows, write_config, write_rows
    from trimtab.config.read import load_config
    from trimtab.training.run import finetune

    yaml = write_config(root / "run.yaml", folder, write_rows(root / "rows.jsonl", rows(8)), plan=plan)
    return finetune(load_config(yaml)).path


def test_a_system_message_that_the_template_would_leave_out_is_refused() -> None:
    silent = CHATML.replace("for message in messages %}", "for message in messages if message['role'] != 'system' %}")
    tokenizer, model = tiny_tokenizer(silent), tiny_model(400)
    assert "SYSTEM" not in modelfile(tokenizer, model, "m.gguf")[0]
    with pytest.raises(ModelError, match="no place for a system message"):
        modelfile(tokenizer, model, "m.gguf", system="Be brief.")


def test_an_adapter_for_programs_that_load_no_gguf_file_says_beside_what_it_trained(
    trained: Any, tmp_path: Path
) -> None:
    run = trained("small", LORA, on_gguf=True, **SMALL)
    for form in ("lora", "mlx"):
        told = handed(form, run, tmp_path / form).notes
        assert any("trained beside the weights of tiny.gguf" in one for one in told)
        card = (tmp_path / form / "README.md").read_text()
        used = card[card.index("## How it is used") :]
        assert "BASE" in used
        assert "tiny.gguf" not in used
    assert not any("trained beside the weights" in one for one in handed("gguf-lora", run, tmp_path / "own").notes)


def test_a_file_of_a_model_of_another_size_is_told_by_its_shapes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    file = GgufFile(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"attn_q\.weight has 64 x 64 numbers, and .*q_proj\.weight of .* 32 x 32"):
        file.place("model.layers.0.self_attn.q_proj.weight", torch.zeros(32, 32), TURNED, exact=False)


@pytest.mark.usefixtures("bare_runs")
def test_a_gguf_file_of_the_same_model_takes_the_merged_weights(tmp_path: Path) -> None:
    folder, file = _folder_of_gguf(tmp_path)
    run = _trained_on(folder, tmp_path, LORA)
    with pytest.raises(ModelError, match=r"did not come from a GGUF file.*--gguf FILE"):
        handed("gguf", run, tmp_path / "a")
    assert handed("gguf", run, tmp_path / "a", gguf=file, type="f32").agreement.kl < 1e-6
    write_gguf(tmp_path / "other.gguf")
    other = tiny_model(261, hidden_size=64, intermediate_size=96)
    other.save_pretrained(folder)  # another model of the same shape
    with pytest.raises(ModelError, match="in any known order of rows"):
        handed("gguf", run, tmp_path / "b", gguf=file)
    assert not (tmp_path / "b").exists()


def test_without_a_file_the_rows_are_those_of_llama_cpp_s_converter(trained: Any, tmp_path: Path) -> None:
    folder, file = _folder_of_gguf(tmp_path)
    run = _trained_on(folder, tmp_path, LORA)
    told = handed("gguf-lora", run, tmp_path / "table").notes
    assert any("llama.cpp's converter" in one for one in told)
    handed("gguf-lora", run, tmp_path / "file", gguf=file)
    one, other = (gguf.GGUFReader(tmp_path / name / "adapter.gguf") for name in ("table", "file"))
    for first, second in zip(one.tensors, other.tensors, strict=True):
        assert first.name == second.name
        assert np.array_equal(first.data, second.data), first.name


@pytest.mark.parametrize(
    ("form", "wishes", "said"),
    [
        ("gguf", {"type": "q4_k"}, "--type: expected one of f32, f16"),
        ("gguf-lora", {"type": "q8_0"}, "--type: expected one of f32, f16, bf16, got q8_0"),
        ("gguf", {"gguf": Path("gone.gguf")}, "gone.gguf: no such file"),
    ],
)
def test_refusals(form: str, wishes: Any, said: str, trained: Any, tmp_path: Path) -> None:
    run = trained("small", LORA, on_gguf=True, **SMALL)
    with pytest.raises(ModelError, match=said):
        handed(form, run, tmp_path / "out", **wishes)
    assert not (tmp_path / "out").exists()


# The Modelfile

SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
INSIDE = (
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 and sys %}<<{{ sys }}>> {% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_chatml_in_ollama_s_language() -> None:
    text, told = modelfile(tiny_tokenizer(), tiny_model(), "./model.gguf", system="Be brief.")
    assert told == []
    assert text == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ end }}'
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}'
        '{{ if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}{{ if not $last }}<|im_end|>\n'
        "{{ end }}{{ end }}"
        '{{ if and (ne .Role "assistant") $last }}<|im_start|>assistant\n{{ end }}{{ end }}"""\n'
        'SYSTEM """Be brief."""\n'
        'PARAMETER stop "<|eos|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_a_system_message_that_the_template_writes_by_itself_is_told_to_ollama() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SYSTEM + tokenizer.chat_template
    assert 'SYSTEM """Be kind."""' in modelfile(tokenizer, tiny_model(), "./m.gguf")[0]


def test_a_system_message_inside_the_first_turn() -> None:
    tokenizer = tiny_tokenizer(INSIDE)
    found = pieces_of(tokenizer)
    assert found is not None
    assert found.inside
    assert '{{ if eq .Role "system" }}{{ $system = .Content }}{{ end }}' in found.in_go()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",  # counts
        "{{ messages[-1].content }}",  # drops what was said before
        "{% for m in messages %}{{ m.role }} {{ m.content|upper }}\n{% endfor %}",  # changes what was said
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_does_more_is_left_to_ollama_and_told(template: str) -> None:
    text, told = modelfile(tiny_tokenizer(template), tiny_model(), "./m.gguf")
    assert "TEMPLATE" not in text
    assert len(told) == 1


def test_the_tokens_of_a_text_s_beginning_are_left_to_llama_cpp() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"  # as in SmolLM2: a mark of the template, which no text begins with by itself
    found = pieces_of(tokenizer)
    assert found is not None
    assert found.system == ("<|im_start|>system\n", "<|im_end|>\n")


def test_a_damaged_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    with pytest.raises(ModelError, match="cannot be read as a GGUF file"):
        GgufFile(tmp_path / "m.gguf")


def test_a_file_that_the_disk_did_not_take_whole_is_told(tmp_path: Path) -> None:
    """numpy leaves the last bytes of a small tensor to the C library, whose failure it does not look at."""
    write_gguf(tmp_path / "a.gguf")
    file, whole = GgufFile(tmp_path / "a.gguf"), (tmp_path / "a.gguf").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole - 200, before[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            write_copy(file, tmp_path / "b.gguf", {}, {}, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < (tmp_path / "b.gguf").stat().st_size < whole


def test_values_that_do_not_fit_are_an_error() -> None:
    from trimtab.export._gguf_file import encoded

    with pytest.raises(ModelError, match="do not fit into F16"):
        encoded(torch.full((2, 32), 1e6).numpy(), gguf.GGMLQuantizationType.F16, "blk.0.attn_q.weight")
