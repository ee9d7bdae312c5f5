"""A vocabulary that changes after the adapters came."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from sampling import sample

Make = Callable[..., Any]
IDS = torch.tensor([[1, 5, 7, 3], [2, 39, 0, 11]])
RULES: dict[str, list[dict[str, Any]]] = {
    "elsewhere": [{"match": "*.q_proj", "method": "dora", "rank": 2}],
    "on all linear layers": [{"match": "all-linear", "method": "lora", "rank": 2}],
    "on the head": [{"match": "lm_head", "method": "dora", "rank": 2}],
    "on the embedding": [{"match": "*embed_tokens", "method": "lora", "rank": 2}],
    "on both": [{"match": ["*embed_tokens", "lm_head"], "method": "lora", "rank": 2}],
    "a magnitude on the embedding": [{"match": "*embed_tokens", "method": "dora", "rank": 2}],
    "the whole embedding": [{"match": "*embed_tokens", "method": "full"}],
    "the whole head": [{"match": "lm_head", "method": "full"}],
}


def moved(model: nn.Module, rules: list[dict[str, Any]]) -> nn.Module:
    trimtab.attach(model, trimtab.Plan([trimtab.Rule(**rule) for rule in rules]))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("tokens", sample([47, 40, 64], 3, [40]))
def test_tokens_that_stay_keep_what_was_learned(
    tiny_llama: Make, rules: list[dict[str, Any]], tied: bool, tokens: int
) -> None:
    if tied and rules[0]["match"] in ("lm_head", "*embed_tokens") and rules[0]["method"] == "full":
        pytest.skip("a whole module with a tied weight is another test's")
    model = moved(tiny_llama(tie_word_embeddings=tied), rules)
    want = logits(model)
    embedding = model.resize_token_embeddings(tokens)
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape == (tokens, 16)
    got = logits(model)
    assert got.shape[-1] == tokens
    assert torch.allclose(got[..., :40], want, atol=1e-5)
    trained = trimtab.trainable_parameters(model)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    assert not tied or _frozen(model.lm_head) is _frozen(model.model.embed_tokens)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".adapter." not in name)
    merged = copy.deepcopy(model)
    trimtab.merge(merged)
    assert torch.allclose(logits(merged), got, atol=1e-5)


def _frozen(layer: Any) -> Any:
    return layer.base.weight if hasattr(layer, "adapter") else layer.weight


def test_a_new_token_starts_as_in_the_bare_model(tiny_llama: Make) -> None:
    torch.manual_seed(3)
    bare = tiny_llama()
    model = moved(copy.deepcopy(bare), RULES["on both"])
    for one in (bare, model):
        torch.manual_seed(5)
        one.resize_token_embeddings(44)
    new = torch.tensor([[41, 42, 43]])
    got, want = model.get_input_embeddings()(new), bare.get_input_embeddings()(new)
    assert torch.equal(got, want), "an adapter does nothing on it yet"
    assert torch.equal(model.lm_head.weight[40:], bare.lm_head.weight[40:])


@pytest.mark.parametrize("place", ["on the head", "a magnitude on the embedding", "the whole head"])
def test_before_it_trains_an_adapter_changes_no_token_of_a_resized_model(tiny_llama: Make, place: str) -> None:
    bare = tiny_llama()
    model = copy.deepcopy(bare)
    trimtab.attach(model, trimtab.Rule(**RULES[place][0]))
    for one in (bare, model):
        torch.manual_seed(5)
        one.resize_token_embeddings(44)
    new = torch.tensor([[1, 41, 42, 43]])
    torch.testing.assert_close(model(new).logits, bare(new).logits, rtol=0, atol=1e-5)


def test_a_smaller_vocabulary_keeps_the_first_tokens(tiny_llama: Make) -> None:
    model = moved(tiny_llama(), RULES["on both"])
    want = model.get_input_embeddings()(torch.arange(30)).detach()
    model.resize_token_embeddings(30)
    assert torch.allclose(model.get_input_embeddings()(torch.arange(30)), want, atol=1e-6)


def test_adapters_of_a_resized_model_are_saved_and_loaded(tiny_llama: Make, tmp_path: Any) -> None:
    model = moved(tiny_llama(), RULES["on the head"])
    model.resize_token_embeddings(44)
    want = logits(model)
    trimtab.save_adapter(model, tmp_path)
    other = copy.deepcopy(model)
    trimtab.detach(other)
    trimtab.load_adapter(other, tmp_path)
    assert torch.allclose(logits(other), want, atol=1e-6)


def test_a_matrix_that_cannot_follow_is_refused_before_anything_changes(tiny_llama: Make) -> None:
    model = moved(tiny_llama(), [{"match": "lm_head", "method": "mora", "rank": 2}])
    want = logits(model)
    with pytest.raises(trimtab.SurgeryError, match=r"of method mora sits on the vocabulary.*Nothing was changed"):
        model.resize_token_embeddings(44)
    assert torch.equal(logits(model), want)
    assert model.get_input_embeddings().weight.shape == (40, 16)


def test_weights_are_tied_again_under_the_adapters(tiny_llama: Make) -> None:
    model = moved(tiny_llama(tie_word_embeddings=True), RULES["on the embedding"])
    want = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), want)
    assert _frozen(model.lm_head) is _frozen(model.model.embed_tokens)


def test_copies_resize_themselves_and_detached_models_are_as_before(tiny_llama: Make) -> None:
    model = moved(tiny_llama(), RULES["on the head"])
    before = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.resize_token_embeddings(44)
        assert logits(other).shape[-1] == 44
        assert torch.equal(logits(model), before)
    trimtab.detach(model)
    assert "resize_token_embeddings" not in vars(model)
    assert "tie_weights" not in vars(model.model)
    model.resize_token_embeddings(44)
    assert logits(model).shape[-1] == 44
