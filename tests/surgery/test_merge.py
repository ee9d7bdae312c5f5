"""Merging: once, in full digits, and nobody else's weight. Tied weights and modules with two names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab


def attach(model: nn.Module, match: str | list[str], method: str = "lora", **options: Any) -> trimtab.AttachReport:
    """Attach, and move the adapters so that there is something to merge."""
    report = trimtab.attach(model, trimtab.Rule(match=match, method=method, **{"rank": 2, **options}))
    with torch.no_grad():
        for name, parameter in trimtab.trainable_parameters(model).items():
            if name.endswith("magnitude"):
                parameter.mul_(0.9 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return report


def updated(weight: Tensor, adapter: nn.Module) -> Tensor:
    """LoRA and DoRA at the default scale of 2, in float64."""
    total = weight.double() + 2 * adapter.B.detach().double() @ adapter.A.detach().double()
    if adapter.magnitude is None:
        return total
    return total * (adapter.magnitude.detach().double() / total.norm(dim=1))[:, None]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(method: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    weights = [model[0].weight.clone(), model[2].weight.clone()]
    attach(model, "*", method)
    exact = [updated(weight, model[place].adapter) for weight, place in zip(weights, (0, 2), strict=True)]
    report = trimtab.merge(model)
    assert report.modules == ("0", "2")
    assert report.untied == ()
    worst = 0.0
    for want, layer in zip(exact, (model[0], model[2]), strict=True):
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, want.to(dtype)), "rounded once"
        worst = max(worst, ((layer.weight.double() - want).norm() / want.norm()).item())
        assert layer.weight.requires_grad
    assert report.rounding == pytest.approx(worst, rel=1e-3)
    with pytest.raises(trimtab.SurgeryError, match="no adapters"):
        trimtab.merge(model)


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6, bias=False), "c": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    return model


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_two_layers_with_one_weight(method: str) -> None:
    model = tied()
    weight = model["a"].weight.detach().clone()
    report = attach(model, ["a", "b"], method)
    assert model["a"].adapter is model["b"].adapter
    assert model["a"] is not model["b"], "each has its own bias"
    assert [module.parameters > 0 for module in report.modules] == [True, False], "counted once"
    assert report.trainable_parameters == sum(p.numel() for p in trimtab.trainable_parameters(model).values())
    x = torch.randn(3, 6)
    before = model["a"](x), model["b"](x)
    (before[0].sum() + before[1].sum()).backward()
    exact = updated(weight, model["a"].adapter)
    report = trimtab.merge(model)
    assert report.modules == ("a", "b")
    assert report.untied == ()
    assert model["a"].weight is model["b"].weight, "still one weight"
    assert torch.allclose(model["a"].weight.double(), exact, rtol=1e-6, atol=1e-7), "folded once, not twice"
    assert torch.allclose(model["a"](x), before[0], atol=1e-5)
    assert torch.allclose(model["b"](x), before[1], atol=1e-5)


def test_one_layer_under_two_names() -> None:
    layer = nn.Linear(6, 6)
    weight = layer.weight.detach().clone()
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    attach(model, "b.0")
    exact = updated(weight, model["a"].adapter)
    report = trimtab.merge(model)
    assert report.modules == ("a",)
    assert model["a"] is layer
    assert model["b"][0] is layer
    assert torch.allclose(layer.weight.double(), exact, rtol=1e-6, atol=1e-7)


def test_a_weight_shared_with_a_layer_without_an_adapter() -> None:
    """The other layer keeps what it had; two adapted ones that were tied stay tied to each other."""
    model = tied()
    model["c"].weight = model["a"].weight
    weight = model["a"].weight.detach().clone()
    attach(model, ["a", "b"], "dora")
    exact = updated(weight, model["a"].adapter)
    x = torch.randn(3, 6)
    before = {name: layer(x) for name, layer in model.items()}
    report = trimtab.merge(model)
    assert report.untied == ("a",)
    assert torch.equal(model["c"].weight, weight)
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight is not model["c"].weight
    assert torch.allclose(model["a"].weight.double(), exact, rtol=1e-6, atol=1e-7)
    for name, layer in model.items():
        assert torch.allclose(layer(x), before[name], atol=1e-5), name
        assert layer.weight.requires_grad, name


def test_detach_keeps_ties() -> None:
    model = tied()
    weight = model["a"].weight
    attach(model, ["a", "b"])
    trimtab.detach(model)
    assert model["a"].weight is weight
    assert model["b"].weight is weight


def test_an_output_head_tied_to_the_embedding(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.detach().clone()
    ids = torch.arange(12).reshape(2, 6)
    attach(model, ["lm_head", "*.q_proj"], "dora")
    exact = updated(embedding, model.lm_head.adapter)
    with torch.no_grad():
        adapted = model(ids).logits
        assert torch.equal(model.model.embed_tokens.weight, embedding)
        report = trimtab.merge(model)
        assert report.untied == ("lm_head",)
        assert torch.equal(model.model.embed_tokens.weight, embedding), "the embedding keeps what it had"
        assert torch.allclose(model.lm_head.weight.double(), exact, rtol=1e-6, atol=1e-7)
        assert torch.allclose(model(ids).logits, adapted, atol=1e-5)
    assert model.config.tie_word_embeddings is False
    assert all(parameter.requires_grad for parameter in model.parameters()), "both halves train again"

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_merging_other_layers_leaves_the_tie(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    attach(model, "*.q_proj")
    report = trimtab.merge(model)
    assert report.untied == ()
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(value: float) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    attach(model, "*")
    with torch.no_grad():
        model[1].adapter.B[2, 1] = value
    weights = model[0].base.weight.clone()
    with pytest.raises(trimtab.SurgeryError, match="the adapter of 1 holds NaN or infinity"):
        trimtab.merge(model)
    assert torch.equal(model[0].base.weight, weights)
    assert hasattr(model[0], "adapter")


def test_merging_under_autocast_keeps_the_digits() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    weight = model[0].weight.detach().clone()
    attach(model, "0")
    exact = updated(weight, model[0].adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trimtab.merge(model)
    assert torch.equal(model[0].weight, exact.float())


def test_small_updates_survive_the_merge_of_a_full_precision_base() -> None:
    """An update of 1e-6 of the weight moves a float32 weight by several units, in float64 arithmetic."""
    model = nn.Sequential(nn.Linear(64, 64))
    weight = model[0].weight.detach().clone()
    trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=2))
    with torch.no_grad():
        model[0].adapter.B.normal_(std=1e-6)
    exact = updated(weight, model[0].adapter)
    trimtab.merge(model)
    got = model[0].weight.double() - weight.double()
    want = exact - weight.double()
    # Half a float32 unit of each element is what storing costs; the magnitude's own rounding is of that size too.
    assert (got - want).abs().max() <= torch.finfo(torch.float32).eps * weight.abs().max()


def test_a_product_that_overflows_changes_nothing() -> None:
    """Each tensor is finite, their product is not in float16; the layer before it must not be merged either."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).half()
    trimtab.attach(model, trimtab.Plan([trimtab.Rule(match="*", method="lora", rank=2)]))
    with torch.no_grad():
        model[0].adapter.B.fill_(0.5)
        model[1].adapter.A.fill_(300.0)
        model[1].adapter.B.fill_(300.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(trimtab.SurgeryError, match="merged weight of 1 does not fit"):
        trimtab.merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
