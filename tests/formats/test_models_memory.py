"""The estimate of memory against what is really kept, and what the machine is found to have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trimtab.errors import ModelError
from trimtab.formats import memory
from trimtab.formats.memory import GIB, MemoryEstimate, available_memory, check_fits, estimate_memory

VOCABULARY = 100


def llama(blocks: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=blocks,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def kept_for_backward(model: Any, batch_size: int, length: int) -> int:
    """Bytes of the storages that autograd keeps in one forward pass up to the head, weights aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = torch.randint(0, VOCABULARY, (batch_size, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model.get_base_model().model(ids, use_cache=False)
    assert result.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_activations_against_what_autograd_keeps() -> None:
    model = get_peft_model(llama(4), LoraConfig(r=4, target_modules="all-linear"))
    measured = kept_for_backward(model, batch_size=4, length=64)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimate = estimate_memory(
        llama(4), torch.float32, adapter_parameters=trained, batch_size=4, length=64, labels=0
    ).activations
    assert measured < estimate < 1.6 * measured  # an estimate on the safe side, and not far to it


def test_checkpointing_keeps_one_block_and_each_block_s_input() -> None:
    sizes: dict[str, Any] = {"adapter_parameters": 1, "batch_size": 4, "length": 64, "labels": 0}
    plain = estimate_memory(llama(10), torch.float32, **sizes).activations
    frugal = estimate_memory(llama(10), torch.float32, **sizes, gradient_checkpointing=True).activations
    assert frugal == plain // 10 + 10 * 4 * 64 * 192 * 4


def test_weights_and_what_is_trained() -> None:
    # By hand: embedding, then per block q, k, v, o, gate, up, down and two norms, then the last norm.
    block = 192 * 192 * 2 + 192 * 64 * 2 + 3 * 192 * 512 + 2 * 192
    parameters = VOCABULARY * 192 + 2 * block + 192
    with torch.device("meta"):
        model = llama()
    estimate = estimate_memory(model, torch.bfloat16, adapter_parameters=1000, base_parameters_trained=10)
    assert estimate.weights == 2 * parameters  # the tied head is not counted again
    assert (estimate.adapters, estimate.gradients, estimate.optimiser) == (4000, 4040, 8080)
    assert estimate.total == estimate.weights + 4000 + 4040 + 8080 + estimate.activations


def test_logits_are_counted_where_they_are_computed() -> None:
    sizes: dict[str, Any] = {"adapter_parameters": 1, "batch_size": 4, "length": 64}
    everywhere = estimate_memory(llama(), torch.float32, **sizes).activations
    answers = estimate_memory(llama(), torch.float32, **sizes, labels=8).activations
    assert everywhere - answers == (4 * 64 - 8) * VOCABULARY * 12


def test_kept_scores_grow_with_the_square_of_the_length() -> None:
    def scores(length: int) -> int:
        sizes: dict[str, Any] = {"adapter_parameters": 1, "length": length, "labels": 0}
        eager = estimate_memory(llama(), torch.float32, **sizes, eager_attention=True)
        return eager.activations - estimate_memory(llama(), torch.float32, **sizes).activations

    assert scores(128) == 4 * scores(64) > 0


def test_without_training_far_less_is_kept() -> None:
    sizes: dict[str, Any] = {"batch_size": 4, "length": 64, "labels": 4}
    reading = estimate_memory(llama(10), torch.float32, **sizes)
    training = estimate_memory(llama(10), torch.float32, adapter_parameters=1, **sizes)
    assert reading.activations < training.activations / 4
    assert (reading.gradients, reading.optimiser) == (0, 0)


def test_models_that_name_their_sizes_otherwise() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY))
    assert estimate_memory(model, torch.float32, adapter_parameters=1, length=8).activations > 0


def test_what_does_not_fit_is_refused_with_numbers_and_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "0.25")
    estimate = estimate_memory(
        llama(), torch.float32, adapter_parameters=1000, batch_size=64, length=1024, gradient_checkpointing=False
    )
    with pytest.raises(ModelError) as caught:
        check_fits(estimate, "Training tiny")
    text = str(caught.value)
    assert text.startswith(f"Training tiny needs about {estimate.total / GIB:.2f} GiB (weights 0.00, ")
    assert "0.25 GiB of memory are free" in text
    for advice in ("train.batch_size", "train.gradient_checkpointing=true", "train.precision=bfloat16"):
        assert advice in text


def test_advice_leaves_out_what_is_done_already() -> None:
    sizes: dict[str, Any] = {"adapter_parameters": 1, "batch_size": 1, "length": 1, "gradient_checkpointing": True}
    assert estimate_memory(llama(), torch.bfloat16, **sizes).advice == ("a smaller model",)
    assert "a smaller evaluation.batch_size" in estimate_memory(llama(), torch.bfloat16, batch_size=2).advice


def test_what_fits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "1")
    check_fits(MemoryEstimate(weights=GIB), "Training tiny")
    with pytest.raises(ModelError):
        check_fits(MemoryEstimate(weights=GIB + 1), "Training tiny")


def test_the_machine_has_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_MEMORY_GIB", raising=False)
    assert 0 < available_memory() <= memory.psutil.virtual_memory().total


@pytest.mark.parametrize("text", ["much", "inf"])
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", text)
    with pytest.raises(ModelError, match=f"TRIMTAB_MEMORY_GIB: expected a number of GiB, got '{text}'"):
        available_memory()


def _group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_control_groups_of_the_second_version(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    _group(mount / "a" / "b", {"memory.max": "max\n", "memory.current": "50\n", "memory.stat": ""})
    _group(
        mount / "a", {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": "anon 300\ninactive_file 100\n"}
    )
    (tmp_path / "self").write_text("0::/a/b\n")
    assert list(memory._control_group_rooms(tmp_path / "self", mount)) == [700]  # cache can be given back


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    files = {
        "memory.limit_in_bytes": "1000\n",
        "memory.usage_in_bytes": "400\n",
        "memory.stat": "total_inactive_file 50\n",
    }
    _group(mount / "memory", files)  # inside a container, where the name is the host's
    (tmp_path / "self").write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n1:name=systemd:/\n0::/\n")
    assert list(memory._control_group_rooms(tmp_path / "self", mount)) == [650]


def test_a_group_above_its_limit_has_no_room(tmp_path: Path) -> None:
    _group(tmp_path / "cgroup", {"memory.max": "100", "memory.current": "150", "memory.stat": ""})
    (tmp_path / "self").write_text("0::/\n")
    assert list(memory._control_group_rooms(tmp_path / "self", tmp_path / "cgroup")) == [0]


def test_no_control_groups(tmp_path: Path) -> None:
    assert list(memory._control_group_rooms(tmp_path / "none", tmp_path)) == []
