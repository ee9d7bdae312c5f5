"""A traced step against what autograd keeps in a real one, and three blocks against all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import trimtab
from sampling import sample
from trimtab import tasks
from trimtab.memory.trace import Trace
from trimtab.tasks import Batch, Head

BATCH = Batch(4, 64, 4 * 63)
MIXED = [
    trimtab.Rule(match="all-linear", method="lora", rank=4, dropout=0.1),
    trimtab.Rule(match="*.q_proj", layers="outer:1", method="dora", rank=4),
    trimtab.Rule(match="*.down_proj", layers="inner:1", method="mora", rank=4),
]


def llama(dtype: torch.dtype = torch.float32, blocks: int = 5, attention: str = "sdpa") -> Any:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(dtype)


def traced(make: Any, rules: Any, **settings: Any) -> dict[str, Any]:
    with torch.device("meta"):
        model = make()
    trimtab.attach(model, rules)
    return Trace(model, tasks.find("causal_lm")).run(BATCH, **settings)


def kept_in_truth(make: Any, rules: Any) -> int:
    """Bytes of the storages that autograd holds after a real forward pass, weights aside."""
    model = make().train()
    trimtab.attach(model, rules)
    head = Head(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = torch.randint(0, 96, (BATCH.rows, BATCH.length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = head.loss_at_labels(ids, ids, num_items=torch.tensor(BATCH.labels))
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def kept_as_traced(monkeypatch: pytest.MonkeyPatch, make: Any, rules: Any) -> int:
    """The same of the trace: what its ledger holds as activations, less the batch and the loss themselves."""
    found: list[int] = []
    whole = Trace._whole

    def spy(self: Trace, done: Any, stretch: Any) -> Any:
        sizes = [0, 0]
        for place, held in enumerate((done.before, done.kept)):
            for (kind, block), size in held.items():
                if kind == "activations":
                    sizes[place] += size * (1 if block is None else self._copies[block])
        found.append(sizes[1] - sizes[0])
        return whole(self, done, stretch)

    monkeypatch.setattr(Trace, "_whole", spy)
    traced(make, rules)
    return found[-1]


@pytest.mark.parametrize(
    ("rules", "dtype", "attention"),
    sample(
        [
            ([trimtab.Rule(match="all-linear", method="lora", rank=4)], torch.float32, "sdpa"),
            ([trimtab.Rule(match="all-linear", method="dora", rank=4)], torch.bfloat16, "sdpa"),
            ([trimtab.Rule(match="all-linear", method="dora", rank=4, dropout=0.1)], torch.bfloat16, "eager"),
            ([trimtab.Rule(match="all-linear", method="full")], torch.bfloat16, "sdpa"),
            (MIXED, torch.float32, "sdpa"),
        ],
        4,
    ),
)
def test_what_is_kept_is_what_autograd_keeps(
    monkeypatch: pytest.MonkeyPatch, rules: Any, dtype: torch.dtype, attention: str
) -> None:
    def make() -> Any:
        return llama(dtype, attention=attention)

    # Not yet to the byte: LoRA in float32 was found 1.7 % below what autograd's hooks see.
    assert kept_as_traced(monkeypatch, make, rules) == pytest.approx(kept_in_truth(make, rules), rel=0.03)


@pytest.mark.parametrize("match", ["all-linear", "*.experts"])
def test_experts_in_float32(monkeypatch: pytest.MonkeyPatch, match: str) -> None:
    def make() -> Any:
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "vocab_size": 96}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
        return MixtralForCausalLM(MixtralConfig(**sizes, **heads))

    rules = [trimtab.Rule(match=match, method="lora", rank=4)]
    assert kept_as_traced(monkeypatch, make, rules) == pytest.approx(kept_in_truth(make, rules), rel=0.03)


@pytest.mark.parametrize("match", ["*.embed_tokens", ["*.embed_tokens", "lm_head"]])
def test_adapters_on_an_embedding(monkeypatch: pytest.MonkeyPatch, match: Any) -> None:
    rules = [trimtab.Rule(match=match, method="dora", rank=4)]
    # With nothing but frozen layers between, the trace was found 4 and 5 % below.
    assert kept_as_traced(monkeypatch, llama, rules) == pytest.approx(kept_in_truth(llama, rules), rel=0.06)


FULL = [trimtab.Rule(match="all-linear", method="full")]
SETTINGS: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}, {"accumulates": True, "averages": True}]
WAYS = [(settings, rules) for settings in SETTINGS for rules in (MIXED, FULL)]


@pytest.mark.parametrize(("settings", "rules"), sample(WAYS, 4, [(SETTINGS[-1], FULL)]))
def test_three_blocks_stand_for_all(monkeypatch: pytest.MonkeyPatch, rules: Any, settings: Any) -> None:
    evaluated = Batch(3, 32, 3)
    short = traced(lambda: llama(blocks=5), rules, evaluated=evaluated, generates=True, **settings)
    monkeypatch.setattr("trimtab.memory.trace._shorten", lambda model: [1] * len(model.model.layers))
    whole = traced(lambda: llama(blocks=5), rules, evaluated=evaluated, generates=True, **settings)
    for moment in ("evaluating", "training"):
        assert {kind: size for kind, size in short[moment].items() if size} == {
            kind: size for kind, size in whole[moment].items() if size
        }


def test_parts_of_a_step() -> None:
    rule = trimtab.Rule(match="all-linear", method="lora", rank=4)
    model = llama()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = 4 * trimtab.attach(model, rule).trainable_parameters
    found = traced(llama, rule, accumulates=True)["training"]
    assert found["adapters"] == found["gradients"] == trained
    assert found["optimiser"] - 2 * trained == 4 * len(trimtab.trainable_parameters(model))  # AdamW counts its steps
    assert 0 <= found["weights"] - weights <= 1024  # the frequencies of the rotary embedding
    frugal = traced(llama, rule, gradient_checkpointing=True)["training"]
    assert frugal["activations"] < found["activations"] / 2


def test_quantised_weights_and_the_one_that_is_unpacked() -> None:
    with torch.device("meta"):
        model = llama(torch.bfloat16)
    trimtab.attach(model, trimtab.Rule(match="*.q_proj", method="lora", rank=4))
    found = Trace(model, tasks.find("causal_lm"), quantisation="int8").run(BATCH)["training"]
    plain = traced(lambda: llama(torch.bfloat16), trimtab.Rule(match="*.q_proj", method="lora", rank=4))["training"]
    rows = 5 * (64 + 32 + 32 + 64 + 160 + 160 + 64)
    numbers = 5 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)
    assert plain["weights"] - found["weights"] == numbers - 4 * rows
    assert found["activations"] - plain["activations"] == 2 * 64 * 160


def test_another_architecture() -> None:
    def gpt2() -> Any:
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=96))

    found = traced(gpt2, trimtab.Rule(match="all-linear", method="dora", rank=4))["training"]
    assert found["activations"] > 4 * BATCH.rows * BATCH.length * 32 * 12


@pytest.mark.full
def test_rows_one_behind_the_other_take_one_mask_of_all_their_tokens() -> None:
    """Eager attention has a number for every two tokens of what it takes for one row: [heads, 512, 512] in place of
    [8, heads, 64, 64], in each of the blocks."""
    found = {}
    for packed in (False, True):
        with torch.device("meta"):
            model = llama(attention="eager")
        trimtab.attach(model, MIXED)
        batch = Batch(8, 64, 8 * 63, packed=packed)
        found[packed] = Trace(model, tasks.find("causal_lm")).run(batch)["training"]["activations"]
    more = 5 * 4 * (512 * 512 - 8 * 64 * 64) * 4  # blocks, heads, pairs, bytes
    assert found[True] - found[False] > 0.9 * more
