"""The head at chosen positions: the same loss, gradients and scores as the model's own full logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from evaluation_cases import gpt2, llama
from trimtab.models import head_loss as loss_module
from trimtab.tasks import Head

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def chunks_of(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", positions)
    monkeypatch.setattr(loss_module, "FROZEN_CHUNK", positions)


def gemma2() -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=32))


def granite() -> Any:
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))


def cohere() -> Any:
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))


def phi() -> Any:
    """A head with a bias."""
    model = PhiForCausalLM(PhiConfig(**{**SIZES, "num_key_value_heads": 2}))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def scaled_inside() -> Any:
    """A model that scales what goes into its head, as MiniCPM does."""

    class Scaled(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Any = None, use_cache: Any = None) -> Any:
            output = self.model(input_ids=input_ids, use_cache=use_cache)
            output.logits = self.lm_head(output.last_hidden_state / 2)
            output.loss = None if labels is None else self.loss_function(output.logits, labels, 50)
            return output

    return Scaled(llama(50).config)


def padded(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Three rows of 12, 9 and 5 tokens, padded on the right; labels on the last few of each, and some inside."""
    ids = torch.randint(1, vocabulary, (3, 12))
    labels = torch.full_like(ids, -100)
    for row, length in enumerate((12, 9, 5)):
        labels[row, length - 3 : length] = ids[row, length - 3 : length]
        ids[row, length:] = 0
    labels[0, 1] = ids[0, 1]
    return ids, labels


def exact_loss(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
    """The mean loss from full logits, and the model, in float64 throughout (transformers' own loss is float32)."""
    exact = copy.deepcopy(model).double()
    logits = exact(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten()), exact


@pytest.mark.parametrize("make", [llama, gpt2, phi, lambda: llama(tie_word_embeddings=True)])
@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(17)])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_loss_and_gradients_equal_the_models(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], num_items: Any, chunk: int
) -> None:
    chunks_of(monkeypatch, chunk)
    model = make().train()
    ids, labels = padded(50)
    expected, exact = exact_loss(model, ids, labels)
    if num_items is not None:
        expected = expected * int((labels[:, 1:] != -100).sum()) / int(num_items)
    expected.backward()
    head = Head(model)
    assert head.sparse
    loss = head.loss_at_labels(ids, labels, num_items=num_items)
    loss.backward()
    # Two blocks in float32 against float64: gradients up to 10, each a sum of some hundred roundings of 6e-8.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("make", [gemma2, granite, cohere, scaled_inside])
def test_special_heads_fall_back_and_agree(make: Callable[[], Any]) -> None:
    """Also Gemma 2 with random weights, whose logits are so small that the softcap is below rounding."""
    model = make()
    ids, labels = padded(50)
    head = Head(model)
    assert not head.sparse
    expected, exact = exact_loss(model, ids, labels)
    loss = head.loss_at_labels(ids, labels)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-5)
    summed = head.loss_at_labels(ids, labels, num_items=40)
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(summed.double(), expected * count / 40, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [llama, phi, gemma2, granite])
@pytest.mark.parametrize("num_items", [None, 17])
@pytest.mark.parametrize("labelled", [True, False])
def test_labels_that_count_less(make: Callable[[], Any], num_items: int | None, labelled: bool) -> None:
    model = make().train()
    ids, labels = padded(50)
    lesser = torch.where((labels == -100) & (ids != 0), ids, -100)
    lesser[:, 0] = -100
    if not labelled:
        labels = torch.full_like(labels, -100)
    exact = copy.deepcopy(model).double()
    logits = exact(input_ids=ids).logits[:, :-1].flatten(0, 1)
    sums = [F.cross_entropy(logits, those[:, 1:].flatten(), reduction="sum") for those in (labels, lesser)]
    expected = (sums[0] + 0.3 * sums[1]) / (num_items or max(1, int((labels[:, 1:] != -100).sum())))
    loss = Head(model).loss_at_labels(ids, labels, num_items=num_items, lesser=lesser, weight=0.3)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        atol = 2e-5 * float(theirs.grad.abs().max() + 1)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=atol)


def test_a_mixture_of_experts_keeps_its_balancing_loss() -> None:
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)).eval()
    ids, labels = padded(50)
    torch.testing.assert_close(Head(model).loss_at_labels(ids, labels), model(input_ids=ids, labels=labels).loss)
    model.config.output_router_logits = False
    assert Head(model).sparse


@pytest.mark.parametrize("make", [llama, gemma2])
def test_a_batch_without_labels_costs_nothing(make: Callable[[], Any]) -> None:
    model = make()
    ids, labels = padded(50)
    for num_items in (None, 3):
        loss = Head(model).loss_at_labels(ids, torch.full_like(labels, -100), num_items=num_items)
        loss.backward()
        assert loss == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_the_head_sees_labelled_positions_only() -> None:
    model = llama()
    head = Head(model)
    ids, labels = padded(50)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].shape[0]))
    head.loss_at_labels(ids, labels)
    assert rows == [int((labels[:, 1:] != -100).sum())]


def test_padding_changes_nothing() -> None:
    model = llama().double()
    ids, labels = padded(50)
    head = Head(model)
    wide = head.loss_at_labels(ids, labels, num_items=1)
    alone = sum(
        head.loss_at_labels(ids[row : row + 1, :length], labels[row : row + 1, :length], num_items=1)
        for row, length in enumerate((12, 9, 5))
    )
    torch.testing.assert_close(wide, alone, rtol=1e-12, atol=0)


def test_autocast_trains_a_float32_head_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 4)
    model = llama(tie_word_embeddings=True)
    ids, labels = padded(50)
    head = Head(model)
    head.loss_at_labels(ids, labels).backward()
    exact = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss_at_labels(ids, labels)
    loss.backward()
    for found, true in zip(model.parameters(), exact, strict=True):
        assert found.grad.dtype == torch.float32
        # bfloat16 keeps 8 bits: 0.4 % a rounding, through two blocks and back.
        assert (found.grad - true).norm() < 0.05 * true.norm()


@pytest.mark.parametrize("make", [llama, gpt2, gemma2, granite])
def test_log_probabilities_equal_full_logits_in_float64(make: Callable[[], Any]) -> None:
    model = make().eval()
    ids, _ = padded(50)
    positions, tokens = torch.tensor([0, 11, 14, 20, 24 + 4]), torch.randint(0, 50, (5, 3))
    found = Head(model).log_probabilities(ids, positions, tokens)
    logits = copy.deepcopy(model).double()(input_ids=ids).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(found.double(), logits.log_softmax(1).gather(1, tokens), rtol=1e-5, atol=1e-5)


def test_scores_are_finer_than_bfloat16_logits() -> None:
    """Logits near 30 are multiples of 1/8 in bfloat16; two tokens whose rows differ by less must still differ."""
    model = llama().bfloat16()
    ids, _ = padded(50)
    with torch.no_grad():
        state = model.model(ids).last_hidden_state[0, 11].float()
        model.lm_head.weight[7] = (30 * state / state.square().sum()).bfloat16()
        model.lm_head.weight[8] = model.lm_head.weight[7]
        model.lm_head.weight[8, 0] *= 1 + 2**-7
        assert model(ids).logits[0, 11, 7] == model(ids).logits[0, 11, 8]
        exact = model.lm_head.weight.double() @ state.double()
    found = Head(model).log_probabilities(ids, torch.tensor([11]), torch.tensor([[7, 8]]))[0]
    assert found[0] != found[1]
    torch.testing.assert_close(found.double(), exact.log_softmax(0)[[7, 8]], rtol=0, atol=2e-2)
    assert (found <= 0).all()


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Head(model)
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head._forward_hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_put_onto_the_head_later_counts() -> None:
    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * self.inner(hidden)

    model = llama()
    head = Head(model)
    model.lm_head = Doubled(model.lm_head)
    ids, labels = padded(50)
    torch.testing.assert_close(head.loss_at_labels(ids, labels), model(input_ids=ids, labels=labels).loss)
    found = head.log_probabilities(ids, torch.tensor([3]), torch.tensor([[4]]))
    torch.testing.assert_close(found[0, 0], model(ids).logits[0, 3].log_softmax(0)[4])
