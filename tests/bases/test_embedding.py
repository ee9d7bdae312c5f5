"""Look-ups: what each method computes on one, the padding entry, and derived classes that multiply by a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import plain_formula
import trimtab
from trimtab import bases

METHODS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 2},
    {"method": "dora", "rank": 2},
    {"method": "dora", "rank": 0},
    {"method": "dora", "rank": 2, "magnitude_axis": "input"},
    {"method": "dora", "rank": 2, "detach_norm": False},
    {"method": "mora", "rank": 2},
    {"method": "mora", "rank": 2, "form": "sharing", "magnitude": True},
    {"method": "full", "magnitude": True},
    {"method": "full", "magnitude": True, "detach_norm": False},
]
PAD = 3


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.rand_like(parameter))


def expected(model: Any, options: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """The effective weight ``[out, in]`` by the plain formula, of ``tensors`` in float64. Of the padding entry nothing
    is trained: it is a constant in the factor that has it, and has no part in a square update."""
    weight = model[0].base.weight.detach().double().t()
    padding = -1 if model[0].base.padding_idx is None else model[0].base.padding_idx
    columns = torch.arange(weight.shape[1])
    own = {
        name: torch.where(columns == padding, value.detach(), value) if name in ("A", "weight") else value
        for name, value in tensors.items()
    }
    update = plain_formula.update(options["method"], options, own, weight)
    if options["method"] == "mora":
        update = torch.where(columns == padding, 0.0, update)
    axis, detach = options.get("magnitude_axis", "output"), options.get("detach_norm", True)
    return plain_formula.effective(weight + update, tensors.get("magnitude"), axis, detach)


@pytest.mark.parametrize("padding", [None, PAD])
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_outputs_and_gradients_are_those_of_the_effective_weight(options: dict[str, Any], padding: int | None) -> None:
    layer = nn.Embedding(11, 6, padding_idx=padding, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_()  # the padding entry, too
    model: Any = nn.Sequential(layer)
    ids = torch.tensor([[1, 3, 1, 9, 10, 3, 0], [2, 1, 7, 4, 5, 6, 8]])
    start = model(ids).detach()
    trimtab.attach(model, trimtab.Rule(match="0", **options))
    torch.testing.assert_close(model(ids), start, rtol=1e-12, atol=1e-12)
    stir(model)
    trained = trimtab.trainable_parameters(model)
    tensors = {name: value.detach().double().requires_grad_() for name, value in model[0].adapter.named_parameters()}
    wanted = expected(model, options, tensors).t()[ids]
    got = model(ids)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(wanted)
    if options.get("magnitude_axis") == "input" and padding is not None:
        upstream[ids == padding] = 0  # the magnitude of the padding entry is not trained, either
    found = torch.autograd.grad(got, list(trained.values()), upstream)
    want = torch.autograd.grad(wanted, list(tensors.values()), upstream)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "name"), [("lora", "A"), ("dora", "A"), ("full", "weight")])
def test_gradients_by_frequency_are_those_divided_by_how_often_an_entry_occurs(method: str, name: str) -> None:
    ids = torch.tensor([1, 2, 1, 5, 1, 2])
    found = []
    for by_frequency in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Embedding(7, 5, scale_grad_by_freq=by_frequency, dtype=torch.float64))
        options = {} if method == "full" else {"rank": 2}
        trimtab.attach(model, trimtab.Rule(match="0", method=method, **options))
        stir(model)
        model(ids).square().sum().backward()
        found.append(getattr(model[0].adapter, name).grad)
    counts = torch.tensor([1.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    divided = found[0] / (counts.unsqueeze(1) if found[0].shape[0] == 7 else counts)
    torch.testing.assert_close(found[1], divided)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_training_leaves_the_padding_entry_alone(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(12, 6, padding_idx=PAD))
    ids = torch.randint(12, (4, 9))
    trimtab.attach(model, trimtab.Rule(match="0", **options))
    optimiser = torch.optim.AdamW(trimtab.trainable_parameters(model).values(), lr=0.05, weight_decay=0.1)
    target = torch.randn(4, 9, 6)
    before = trimtab.effective_weight(model, "0")
    for _ in range(5):
        optimiser.zero_grad()
        (model(ids) - target).square().mean().backward()
        optimiser.step()
    after = trimtab.effective_weight(model, "0")
    assert not after[:, PAD].any()
    assert float((after - before).norm()) > 0.1
    assert not model(torch.tensor([PAD])).any()
    trimtab.merge(model)
    torch.testing.assert_close(model[0].weight.t(), after, rtol=1e-6, atol=1e-6)
    assert model[0].padding_idx == PAD


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_entry_that_no_batch_named_keeps_its_direction(method: str) -> None:
    model: Any = nn.Sequential(nn.Embedding(12, 6))
    before = model[0].weight.detach().clone()
    trimtab.attach(model, trimtab.Rule(match="0", method=method, rank=2))
    optimiser = torch.optim.SGD(trimtab.trainable_parameters(model).values(), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.tensor([1, 4])).square().sum().backward()
        optimiser.step()
    moved = trimtab.effective_weight(model, "0").t() - before
    if method == "lora":
        assert moved.norm(dim=1).nonzero().flatten().tolist() == [1, 4]
    assert not model[0].adapter.A[:, [0, 2, 3, 5]].any()


class Halved(nn.Embedding):
    """Multiplies by a number that stands nowhere but in its code."""

    def forward(self, entries: Tensor) -> Tensor:
        return super().forward(entries) * 0.5


class Offset(nn.Embedding):
    """Looks up another entry than the one it is asked for."""

    def forward(self, entries: Tensor) -> Tensor:
        return super().forward((entries + 1) % self.num_embeddings)


class Normed(nn.Embedding):
    """Shortens each entry to length 1."""

    def forward(self, entries: Tensor) -> Tensor:
        return F.normalize(super().forward(entries), dim=-1)


class Only(nn.Embedding):
    """Changes nothing."""


SCALED: dict[str, Callable[[], nn.Module]] = {
    "Gemma3": lambda: Gemma3TextScaledWordEmbedding(13, 6, 0, embed_scale=math.sqrt(6)),
    "Bart": lambda: BartScaledWordEmbedding(13, 6, 0, embed_scale=math.sqrt(7)),
    "a number in the code": lambda: Halved(13, 6),
    "nothing": lambda: Only(13, 6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", SCALED)
def test_a_scaled_look_up_starts_and_merges_exactly(kind: str, dtype: torch.dtype) -> None:
    model: Any = nn.Sequential(SCALED[kind]().to(dtype))
    ids = torch.arange(13).view(1, 13)
    start = model(ids)
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    assert torch.equal(model(ids), start), "bit for bit"
    stir(model)
    weight = trimtab.effective_weight(model, "0").double().t()
    scale = {"Gemma3": math.sqrt(6), "Bart": math.sqrt(7), "a number in the code": 0.5, "nothing": 1.0}[kind]
    before, eps = model(ids), torch.finfo(dtype).eps
    size = float(weight.abs().max() * scale)
    torch.testing.assert_close(before[0].double(), weight * scale, rtol=0, atol=4 * max(eps, 1e-7) * size)
    trimtab.merge(model)
    torch.testing.assert_close(model(ids), before, rtol=0, atol=4 * eps * size)


def test_a_scale_that_changes_later_is_followed() -> None:
    model: Any = nn.Sequential(BartScaledWordEmbedding(13, 6, 0, embed_scale=2.0))
    ids = torch.arange(13)
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    stir(model)
    before = model(ids)
    model[0].base.embed_scale = 3.0
    torch.testing.assert_close(model(ids), 1.5 * before)


@pytest.mark.parametrize("layer", [Offset(7, 4), Normed(7, 4), BartLearnedPositionalEmbedding(7, 4)], ids=str)
def test_a_derived_class_that_does_something_else_is_not_taken(layer: nn.Module) -> None:
    assert bases.find(layer) is None
    with pytest.raises(trimtab.PlanError, match=f"no base knows.*{type(layer).__name__}"):
        trimtab.attach(nn.Sequential(layer, nn.Linear(4, 4)), trimtab.Rule(match="0", method="lora", rank=2))


def test_the_probe_needs_no_weights_and_no_random_numbers() -> None:
    layer = Gemma3TextScaledWordEmbedding(13, 6, 0, embed_scale=2.5)
    state = torch.get_rng_state()
    handle = bases.find(layer.to("meta"))
    assert handle is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_max_norm_is_refused_in_words() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0))
    with pytest.raises(trimtab.PlanError, match=r"0 \(rule 1\): .*max_norm=1.0: .*shortens entries"):
        trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    assert type(model[0]) is nn.Embedding


def test_under_autocast_a_look_up_keeps_its_dtype() -> None:
    model: Any = nn.Sequential(nn.Embedding(7, 4))
    ids = torch.arange(7)
    trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=2))
    stir(model)
    exact = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(ids)
    assert torch.equal(got, exact)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.full)])
def test_compiled_in_one_graph(training: bool) -> None:
    model: Any = nn.Sequential(nn.Embedding(11, 6, padding_idx=0)).train(training)
    trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=2))
    stir(model)
    ids = torch.randint(11, (3, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want, got = model(ids), compiled(ids)
    torch.testing.assert_close(got, want)
    if training:
        parameters = list(trimtab.trainable_parameters(model).values())
        upstream = torch.randn_like(want)
        for one, other in zip(
            torch.autograd.grad(got, parameters, upstream), torch.autograd.grad(want, parameters, upstream), strict=True
        ):
            torch.testing.assert_close(one, other)
